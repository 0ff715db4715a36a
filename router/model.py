"""The router's description of the served model, read from the tokenizer and JSON files of its checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvrelay.checkpoint_files import eos_token_ids, finite_number, positive_integer, read_json_object
from kvrelay.config.cluster_config import ClusterConfig
from kvrelay.errors import CheckpointError
from kvrelay.runtime.logging import log_event
from router.text.plain_tokenizer import plain_tokenizer
from router.text.tokenizer import TextTokenizer
from router.tools.formats import REASONING_MARKS, ToolFamily, has_reasoning, tool_family

_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The one model of this cluster.

    ``default_sampling``: defaults for requests. ``tokenizer_config``: content of ``tokenizer_config.json``.
    ``tool_family``: the format of its tool calls, if it has any. ``reasons``: its output may begin with reasoning.
    ``mark_ids``: special tokens in these formats.
    """

    name: str
    root: str
    tokenizer: TextTokenizer
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    default_sampling: dict[str, float] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    tool_family: ToolFamily | None = None
    reasons: bool = False
    mark_ids: frozenset[int] = frozenset()

    def mark(self, text: str) -> str:
        """Return the terminal of ``text`` in a grammar: the special token if it is one, else a string."""
        [*ids] = self.tokenizer.special_ids([text])
        return f"<[{ids[0]}]>" if ids else json.dumps(text)


def load_model(config: ClusterConfig) -> ServedModel:
    """Read the tokenizer, ``config.json`` and ``generation_config.json`` of the configured checkpoint.

    The fake engine needs no checkpoint; without one its tokens are bytes. Raises CheckpointError if a file is missing
    or damaged, or if the tokenizer adds tokens outside the model's vocabulary to every text.
    """
    model_dir = Path(config.model.path)
    fake = config.engine.fake if config.engine.kind == "fake" else None
    if fake and not (model_dir / "tokenizer.json").is_file():
        length = config.model.max_model_len or fake.max_model_len
        return ServedModel(
            config.model.name,
            str(model_dir),
            plain_tokenizer(fake.vocab_size),
            fake.vocab_size,
            length,
            aliases=config.model.aliases,
            tool_family=tool_family(config.router.tool_parser, None),
            reasons=has_reasoning(config.router.reasoning_parser, None),
        )
    tokenizer = TextTokenizer.load(model_dir)
    settings = read_json_object(model_dir / "config.json", required=fake is None)
    generation = read_json_object(model_dir / "generation_config.json", required=False)
    vocab_size = fake.vocab_size if fake else _size(settings, "vocab_size", tokenizer.vocab_size)
    _require_known(tokenizer, vocab_size)
    family = tool_family(config.router.tool_parser, tokenizer.tool_template)
    reasons = has_reasoning(config.router.reasoning_parser, tokenizer.chat_template)
    return ServedModel(
        name=config.model.name,
        root=str(model_dir),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        max_model_len=config.model.max_model_len or _size(settings, "max_position_embeddings", 2048),
        eos_token_ids=_eos_token_ids(generation, settings, tokenizer.eos_token_id, vocab_size),
        default_sampling=_default_sampling(generation),
        aliases=config.model.aliases,
        tokenizer_config=read_json_object(model_dir / "tokenizer_config.json", required=False),
        tool_family=family,
        reasons=reasons,
        mark_ids=tokenizer.special_ids([*(family.marks if family else ()), *(REASONING_MARKS if reasons else ())]),
    )


def _size(settings: dict[str, Any], key: str, default: int) -> int:
    return positive_integer(settings, key) if key in settings else default


def _require_known(tokenizer: TextTokenizer, vocab_size: int) -> None:
    """Raise CheckpointError if the tokenizer adds a token outside the model's vocabulary to every text."""
    unknown = [token_id for token_id in tokenizer.encode("") if token_id >= vocab_size]
    if unknown:
        raise CheckpointError(
            f"the tokenizer adds {tokenizer.tokens_of(unknown)} ({unknown}) to every text, "
            f"but the model's vocabulary has only {vocab_size} tokens"
        )


def _eos_token_ids(
    generation: dict[str, Any], settings: dict[str, Any], of_tokenizer: int | None, vocab_size: int
) -> tuple[int, ...]:
    """Return all end-of-text ids within the model's vocabulary.

    Ids beyond the vocabulary are never sampled, so the checkpoint is accepted with a warning. They are dropped because
    ``min_tokens`` uses ids as indices.
    """
    named = [*eos_token_ids(generation, "generation_config.json"), *eos_token_ids(settings, "config.json")]
    named += [] if of_tokenizer is None else [of_tokenizer]
    unknown = [token_id for token_id in named if not 0 <= token_id < vocab_size]
    if unknown:
        log_event("warning", "eos_token_id beyond the vocabulary", {"ids": unknown, "vocab_size": vocab_size})
    return tuple(dict.fromkeys(token_id for token_id in named if token_id not in unknown))


def _default_sampling(generation: dict[str, Any]) -> dict[str, float]:
    """Return the sampling defaults in ``generation_config.json``. Raises CheckpointError if one is not a number."""
    given = {name: generation[name] for name in _SAMPLING_DEFAULTS if generation.get(name) is not None}
    for name, value in given.items():
        finite_number(value, name, "generation_config.json")
    return given
