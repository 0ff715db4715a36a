"""The Qwen3 architecture in PyTorch, small: parameters carry the names of the Hugging Face checkpoint."""

from __future__ import annotations

import torch  # type: ignore[import-not-found]
from torch import Tensor, nn
from torch.nn import functional  # type: ignore[import-not-found]

from demo_model.attention import attend
from demo_model.config import ModelConfig


class RMSNorm(nn.Module):  # type: ignore[misc]
    """Root mean square norm, computed in float32, returned in bfloat16."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to the same."""
        x = x.float()
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(torch.bfloat16)


class Attention(nn.Module):  # type: ignore[misc]
    """Attention with as many KV heads as query heads, RMS-normed queries and keys and rotary positions."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        width = c.num_attention_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Mix values [batch, length, hidden_size] over earlier positions."""
        batch, length, _ = x.shape
        projected = linear(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = projected.view(batch, length, 3, -1, self.c.head_dim).unbind(2)
        q = rotate(self.q_norm(q), cos, sin).transpose(1, 2)
        k = rotate(self.k_norm(k), cos, sin).transpose(1, 2)
        mixed, _ = attend(q, k, v.float().transpose(1, 2))
        return linear(mixed.transpose(1, 2).reshape(batch, length, -1).to(torch.bfloat16), self.o_proj)


class FeedForward(nn.Module):  # type: ignore[misc]
    """SwiGLU."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Each position on its own: [..., hidden_size] to the same."""
        gate, up = linear(x, self.gate_proj, self.up_proj).chunk(2, -1)
        return linear(functional.silu(gate) * up, self.down_proj)


class Layer(nn.Module):  # type: ignore[misc]
    """Pre-norm attention and feed-forward, each added to the stream."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = FeedForward(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[batch, length, hidden_size] to the same."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):  # type: ignore[misc]
    """Embedding, layers, last norm."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class DemoModel(nn.Module):  # type: ignore[misc]
    """Qwen3ForCausalLM with tied embeddings."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.model = Decoder(c)
        nn.init.normal_(self.model.embed_tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states [batch, length, hidden_size] of token ids [batch, length]."""
        cos, sin = rotary_tables(tokens.shape[1], self.c.head_dim, self.c.rope_theta)
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab_size] of hidden states."""
        return linear(hidden, self.model.embed_tokens)


def rotary_tables(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, 1, head_dim / 2] of every position and frequency."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.arange(length, dtype=torch.float32)[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of [batch, length, heads, head_dim] by the position's angles."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def linear(x: Tensor, *layers: nn.Module) -> Tensor:
    """What each of ``layers`` makes of ``x``, side by side: weights are float32 where they are kept, bfloat16 here."""
    weights = [layer.weight for layer in layers]
    return functional.linear(x, (torch.cat(weights) if len(weights) > 1 else weights[0]).to(torch.bfloat16))
