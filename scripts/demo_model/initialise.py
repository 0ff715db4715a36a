"""Where training starts: not from plain noise, but near a circuit that copies.

A head that looks a fact up needs two things that are slow to learn from nothing on a CPU: heads of the first layer
that tell each token what the few tokens before it were, and heads of the second that find where the present token stood
before and copy what came after it. So the first layer begins with heads that attend 1, 2, 3, ... positions back, and
the second with heads that match on what those wrote; everything is noisy and free to change. From plain noise, a
thousand steps of copying had not got to where this starts.
"""

from __future__ import annotations

import torch  # type: ignore[import-not-found]
from torch import Tensor, nn

from demo_model.model import Attention, DemoModel

EMBEDDING_STD = 0.12
NORM_WEIGHT = 2.0  # of queries and keys: sharper attention than 1 from the start
SHARP_PAIRS = 4  # rotary pairs, fastest first, that tell positions apart
FIRST_GAIN, SECOND_GAIN, LATER_GAIN = 0.5, 1.7, 0.3
NOISE = 0.1


@torch.no_grad()  # type: ignore[untyped-decorator]
def initialise(model: DemoModel) -> None:
    """Fill the weights of a model whose query and KV heads are as many; draws from torch's global generator."""
    c = model.c
    common = nn.functional.normalize(torch.randn(c.hidden_size), dim=0)
    off_common = torch.eye(c.hidden_size) - torch.outer(common, common)
    embedding = model.model.embed_tokens.weight
    nn.init.normal_(embedding, std=EMBEDDING_STD)
    # Every embedding shares one direction: a head that attends by position alone needs something constant to read.
    embedding.copy_(embedding @ off_common + EMBEDDING_STD * c.hidden_size**0.5 * common)
    read = _orthogonal(c.hidden_size)[: c.head_dim] @ off_common
    write = (_orthogonal(c.hidden_size) @ off_common).split(c.head_dim)
    first, second, *later = model.model.layers
    for layer in model.model.layers:
        nn.init.constant_(layer.self_attn.q_norm.weight, NORM_WEIGHT)
        nn.init.constant_(layer.self_attn.k_norm.weight, NORM_WEIGHT)
        nn.init.normal_(layer.mlp.down_proj.weight, std=0.02)
    _attend_backwards(first.self_attn, common, read, write)
    _match_and_copy(second.self_attn, read, write, off_common)
    for layer in later:
        _match_itself(layer.self_attn, off_common)


def _attend_backwards(attention: Attention, common: Tensor, read: Tensor, write: tuple[Tensor, ...]) -> None:
    """Head h attends h + 1 positions back and writes what it reads there into a subspace of its own."""
    c = attention.c
    frequencies = c.rope_theta ** -(torch.arange(0, c.head_dim, 2).float() / c.head_dim)
    key = torch.zeros(c.head_dim)
    key[:SHARP_PAIRS] = 1
    for head, rows in enumerate(_rows(attention)):
        angles = -(head + 1) * frequencies
        a, b = key.chunk(2)
        query = torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()])
        attention.k_proj.weight[rows] = _noisy(torch.outer(key, common))
        attention.q_proj.weight[rows] = _noisy(torch.outer(query, common))
        attention.v_proj.weight[rows] = _noisy(read * FIRST_GAIN)
        attention.o_proj.weight[:, rows] = _noisy(write[head].T * FIRST_GAIN)


def _match_and_copy(attention: Attention, read: Tensor, write: tuple[Tensor, ...], off_common: Tensor) -> None:
    """Head h matches what stood h tokens back here with what stood h + 1 tokens back there, and copies from there."""
    copied = (_orthogonal(len(off_common)) @ off_common).split(attention.c.head_dim)
    for head, rows in enumerate(_rows(attention)):
        attention.q_proj.weight[rows] = _noisy(read if head == 0 else write[head - 1])
        attention.k_proj.weight[rows] = _noisy(write[head])
        attention.v_proj.weight[rows] = _noisy(copied[head] * SECOND_GAIN)
        attention.o_proj.weight[:, rows] = _noisy(copied[head].T * SECOND_GAIN)


def _match_itself(attention: Attention, off_common: Tensor) -> None:
    """Heads that lean to tokens like the present one."""
    size = attention.c.hidden_size
    kept = (_orthogonal(size) @ off_common).split(attention.c.head_dim)
    for head, rows in enumerate(_rows(attention)):
        matched = torch.randn(attention.c.head_dim, size) * size**-0.5
        attention.k_proj.weight[rows] = matched
        attention.q_proj.weight[rows] = _noisy(matched, 1.0)
        attention.v_proj.weight[rows] = _noisy(kept[head] * LATER_GAIN)
        attention.o_proj.weight[:, rows] = _noisy(kept[head].T * LATER_GAIN)


def _rows(attention: Attention) -> list[slice]:
    size = attention.c.head_dim
    return [slice(head * size, (head + 1) * size) for head in range(attention.c.num_attention_heads)]


def _orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size))[0]


def _noisy(weight: Tensor, noise: float = NOISE) -> Tensor:
    return weight + noise * weight.std() * torch.randn_like(weight)
