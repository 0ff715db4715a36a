"""Where training starts: not from plain noise, but near a circuit that copies.

A head that looks a fact up needs two things that are slow to learn from nothing on a CPU: heads of the first layer
that tell each token what the few tokens before it were, and heads of the second that find where the present token stood
before and copy what came after it. So the first layer begins with heads that attend 1, 2, 3, ... positions back, and
the second with heads that match on what those wrote; everything is noisy and free to change. From plain noise, a
thousand steps of copying had not got to where this starts.

Counting begins with a head of the second layer that attends alike to every fact about the word before (in "Number of
keys:", to "key" in "The red key", but not where it is part of an answer) and to the first token of the text: what it
brings from there shrinks as 1 / (1 + number of facts).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch  # type: ignore[import-not-found]
from torch import Tensor, nn

from demo_model.model import Attention, DemoModel

EMBEDDING_STD = 0.12
NORM_WEIGHT = 2.0  # of queries and keys: sharper attention than 1 from the start
SHARP_PAIRS = 4  # rotary pairs, fastest first, that tell positions apart
FIRST_GAIN, SECOND_GAIN, LATER_GAIN = 0.5, 1.7, 0.3
NOISE = 0.1
ALIKE, UNLIKE = 0.9, 0.44
FACT_GAIN, ANSWER_GAIN = 0.8, 0.6
SLOW_PAIRS = 10  # rotary pairs, slowest last, that hardly turn over a whole text: where a match is the same anywhere


@dataclass(frozen=True)
class Roles:
    """Tokens that begin with something in common or are looked for by a head."""

    begin: int
    """The first token of every text."""
    plurals: list[tuple[int, int]]
    """Words with their plurals."""
    facts: list[tuple[int, int]]
    """A token, and how many tokens before a word it stands if that may be the subject of a fact."""
    answers: list[tuple[int, int]]
    """The same for the subject of an answer."""


@torch.no_grad()  # type: ignore[untyped-decorator]
def initialise(model: DemoModel, roles: Roles) -> None:
    """Fill the weights; draws from torch's global generator."""
    c = model.c
    common = nn.functional.normalize(torch.randn(c.hidden_size), dim=0)
    # The stream is shared out: words have their own part, and what each head of the first layer writes another.
    basis = torch.linalg.qr(torch.cat([common[:, None], torch.randn(c.hidden_size, c.hidden_size - 1)], 1))[0].T[1:]
    *write, words = basis.split(
        [c.head_dim] * c.num_attention_heads + [len(basis) - c.num_attention_heads * c.head_dim]
    )
    off_common = words.T @ words
    embedding = model.model.embed_tokens.weight
    nn.init.normal_(embedding, std=EMBEDDING_STD * (c.hidden_size / len(words)) ** 0.5)
    for word, plural in roles.plurals:
        embedding[plural] = ALIKE * embedding[word] + UNLIKE * embedding[plural]
    # Every embedding shares one direction: a head that attends by position alone needs something constant to read.
    embedding.copy_(embedding @ off_common + EMBEDDING_STD * c.hidden_size**0.5 * common)
    read = _part(words, c.head_dim)
    first, second, *later = model.model.layers
    for layer in model.model.layers:
        nn.init.constant_(layer.self_attn.q_norm.weight, NORM_WEIGHT)
        nn.init.constant_(layer.self_attn.k_norm.weight, NORM_WEIGHT)
        nn.init.normal_(layer.mlp.down_proj.weight, std=0.005)
    _attend_backwards(first.self_attn, common, read, write)
    _match_and_copy(second.self_attn, read, write, words)
    for layer in later:
        _match_itself(layer.self_attn, words)

    def shown(tokens: list[tuple[int, int]]) -> Tensor:
        parts = [write[back - 1].T @ read @ embedding[token] for token, back in tokens]
        return torch.stack([nn.functional.normalize(part, dim=0) for part in parts]).sum(0)

    first_token = nn.functional.normalize(off_common @ embedding[roles.begin], dim=0)
    fact = FACT_GAIN * shown(roles.facts) - ANSWER_GAIN * shown(roles.answers)
    _count(second.self_attn, common, first_token, fact, read, write[0])


def counting_head(model: DemoModel) -> list[tuple[Tensor, slice]]:
    """Weights and the rows of them that choose where the head that counts attends, and what it takes from there."""
    attention = model.model.layers[1].self_attn
    rows = _rows(attention)[-1]
    return [(projection.weight, rows) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]


def _attend_backwards(attention: Attention, common: Tensor, read: Tensor, write: list[Tensor]) -> None:
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


def _match_and_copy(attention: Attention, read: Tensor, write: list[Tensor], words: Tensor) -> None:
    """Head h matches what stood h tokens back here with what stood h + 1 tokens back there, and copies from there."""
    for head, rows in enumerate(_rows(attention)):
        attention.q_proj.weight[rows] = _noisy(read if head == 0 else write[head - 1])
        attention.k_proj.weight[rows] = _noisy(write[head])
        copied = _part(words, attention.c.head_dim)
        attention.v_proj.weight[rows] = _noisy(copied * SECOND_GAIN)
        attention.o_proj.weight[:, rows] = _noisy(copied.T * SECOND_GAIN)


def _match_itself(attention: Attention, words: Tensor) -> None:
    """Heads that lean to tokens like the present one."""
    size = attention.c.hidden_size
    for rows in _rows(attention):
        matched = torch.randn(attention.c.head_dim, size) * size**-0.5
        attention.k_proj.weight[rows] = matched
        attention.q_proj.weight[rows] = _noisy(matched, 1.0)
        kept = _part(words, attention.c.head_dim)
        attention.v_proj.weight[rows] = _noisy(kept * LATER_GAIN)
        attention.o_proj.weight[:, rows] = _noisy(kept.T * LATER_GAIN)


def _count(
    attention: Attention, common: Tensor, first_token: Tensor, fact: Tensor, read: Tensor, previous: Tensor
) -> None:
    """The last head attends to facts about the word before and to the first token; it writes how much to that."""
    size = attention.c.head_dim
    slow = [half + pair for pair in reversed(range(size // 2 - SLOW_PAIRS, size // 2)) for half in (0, size // 2)]
    matched = _orthogonal(size)[: len(slow) - 3]
    query, key, value = (torch.zeros(size, attention.c.hidden_size) for _ in range(3))
    query[slow[3:]], key[slow[3:]] = matched @ previous, matched @ read
    query[slow[0]], key[slow[0]] = 0.55 * common, 2 * first_token
    query[slow[1]], key[slow[1]] = 0.3 * common, fact
    key[slow[2]] = 0.5 * common  # so that its norm does not make much of what is neither
    value[0] = 0.6 * first_token
    rows = _rows(attention)[-1]
    attention.q_proj.weight[rows] = _noisy(query)
    attention.k_proj.weight[rows] = _noisy(key)
    attention.v_proj.weight[rows] = _noisy(value)
    attention.o_proj.weight[:, rows] = _noisy(_orthogonal(attention.c.hidden_size)[:, :size])


def _rows(attention: Attention) -> list[slice]:
    size = attention.c.head_dim
    return [slice(head * size, (head + 1) * size) for head in range(attention.c.num_attention_heads)]


def _part(words: Tensor, size: int) -> Tensor:
    """Orthonormal rows of the space that those of ``words`` span."""
    return _orthogonal(len(words))[:size] @ words


def _orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size))[0]


def _noisy(weight: Tensor, noise: float = NOISE) -> Tensor:
    return weight + noise * weight.std() * torch.randn_like(weight)
