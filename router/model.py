"""What the router knows of the model it serves, from the small files of its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvrelay.core.checkpoint_files import read_json_object
from kvrelay.core.config import ClusterConfig
from router.text.plain_tokenizer import plain_tokenizer
from router.text.tokenizer import TextTokenizer

_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The one model of this cluster. ``default_sampling``: what requests get that do not say otherwise."""

    name: str
    root: str
    tokenizer: TextTokenizer
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    default_sampling: dict[str, float] = field(default_factory=dict)


def load_model(config: ClusterConfig) -> ServedModel:
    """Read tokenizer, ``config.json`` and ``generation_config.json`` of the configured checkpoint.

    An engine of kind fake needs no checkpoint; without one its tokens are bytes. Raises CheckpointError if a file is
    missing or damaged.
    """
    model_dir = Path(config.model.path)
    fake = config.engine.fake if config.engine.kind == "fake" else None
    if fake and not (model_dir / "tokenizer.json").is_file():
        length = config.model.max_model_len or fake.max_model_len
        return ServedModel(config.model.name, str(model_dir), plain_tokenizer(fake.vocab_size), fake.vocab_size, length)
    tokenizer = TextTokenizer.load(model_dir)
    settings = read_json_object(model_dir / "config.json", required=fake is None)
    generation = read_json_object(model_dir / "generation_config.json", required=False)
    eos_token_ids = [*_ids(generation), *_ids(settings), tokenizer.eos_token_id]
    return ServedModel(
        name=config.model.name,
        root=str(model_dir),
        tokenizer=tokenizer,
        vocab_size=fake.vocab_size if fake else int(settings.get("vocab_size", tokenizer.vocab_size)),
        max_model_len=config.model.max_model_len or int(settings.get("max_position_embeddings", 2048)),
        eos_token_ids=tuple(dict.fromkeys(token_id for token_id in eos_token_ids if token_id is not None)),
        default_sampling={name: generation[name] for name in _SAMPLING_DEFAULTS if generation.get(name) is not None},
    )


def _ids(settings: dict[str, Any]) -> list[int]:
    """Return the end-of-text ids of a config file, which has one, a list or none."""
    value = settings.get("eos_token_id")
    return value if isinstance(value, list) else [] if value is None else [value]
