"""Tiny checkpoints with a flaw, as fine-tuning and merging make them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer


def set_weights(model_dir: Path, tensor: str, row: int, value: float) -> None:
    """Make all of ``row`` of ``tensor`` [rows, ...], which is stored as float32, ``value``."""
    path = model_dir / "model.safetensors"
    data = path.read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + header_bytes])[tensor]
    assert entry["dtype"] == "F32"
    begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
    values = np.frombuffer(data[begin:end], "<f4").reshape(entry["shape"]).copy()
    values[row] = value
    path.write_bytes(data[:begin] + values.tobytes() + data[end:])


def break_embedding(model_dir: Path, token_id: int) -> None:
    """Make the embedding of ``token_id`` infinite."""
    set_weights(model_dir, "model.embed_tokens.weight", token_id, np.inf)


def add_token(model_dir: Path, text: str, *, special: bool = True) -> int:
    """Add a token to the tokenizer without resizing the embedding; return its id."""
    path = model_dir / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False)])
    tokenizer.save(str(path))
    token_id = tokenizer.token_to_id(text)
    assert token_id is not None
    return int(token_id)


def change_json(model_dir: Path, file: str, **changes: Any) -> None:
    """Change keys of one of the checkpoint's JSON files."""
    path = model_dir / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
