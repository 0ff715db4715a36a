"""The shape of the demo model."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class ModelConfig:
    """The sizes that fix a Qwen3 model."""

    vocab_size: int
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 32
    rope_theta: float = 10_000_000.0
    rms_norm_eps: float = 1e-6

    def to_hf(self, bos: int, eos: int) -> dict[str, object]:
        """The content of config.json."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **asdict(self),
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "torch_dtype": "bfloat16",
        }
