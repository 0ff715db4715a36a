"""The engine for devices with memory of their own: Triton kernels, graphs of whole steps, one framework file."""
