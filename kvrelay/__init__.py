"""A prefill/decode disaggregated LLM serving cluster."""

__version__ = "0.2.0"
