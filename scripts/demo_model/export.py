"""Writing the trained model as a Hugging Face checkpoint in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import torch  # type: ignore[import-not-found]
from safetensors.torch import save_file
from tokenizers import Tokenizer

from demo_model.model import DemoModel
from demo_model.tokenizer import BEGIN, END, save_tokenizer, token_id


def save_checkpoint(model: DemoModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights, config and tokenizer into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.c.to_hf(bos=token_id(tokenizer, BEGIN), eos=token_id(tokenizer, END))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(folder)
