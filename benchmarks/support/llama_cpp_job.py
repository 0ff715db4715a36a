"""Runs in llama.cpp's environment: writes a checkpoint as GGUF, and generates from that (see ``prompt_jobs``).

Usage: python llama_cpp_job.py CHECKPOINT GGUF BF16|Q8_0 THREADS. The GGUF is written if it is missing. Only for
checkpoints of Qwen2 in one file: no other needs to be compared.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from llama_cpp import Llama

sys.path.append(str(Path(__file__).parents[1]))
from support.prompt_jobs import answer_prompts

CONTEXT, BATCH = 2048, 512
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(checkpoint: Path, target: Path, kind: GGMLQuantizationType) -> None:
    """Write matrices as ``kind`` and vectors as float32. The file has no tokenizer: prompts are token ids."""
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(target.with_suffix(".part"), "qwen2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, values in tensors(checkpoint / "model.safetensors"):
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), values)
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    target.with_suffix(".part").rename(target)


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a tensor: ``model.layers.3.mlp.up_proj.weight`` is ``blk.3.ffn_up.weight``."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def tensors(path: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield each tensor of a safetensors file in bfloat16, as float32."""
    data = np.memmap(path, np.uint8, "r")
    begin = 8 + int(data[:8].view(np.uint64)[0])
    for name, entry in json.loads(bytes(data[8:begin])).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            halves = np.frombuffer(data[begin + first : begin + last].tobytes(), np.uint16)
            yield name, (halves.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])


def main() -> None:
    checkpoint, target, kind, threads = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    if not target.exists():
        write_gguf(checkpoint, target, GGMLQuantizationType[kind])
    model = Llama(str(target), n_ctx=CONTEXT, n_batch=BATCH, n_threads=threads, n_threads_batch=threads, verbose=False)

    def generate(prompt: list[int], num_tokens: int) -> Iterator[int]:
        model.reset()
        return islice(model.generate(prompt, temp=0.0, repeat_penalty=1.0), num_tokens)

    answer_prompts(generate, threads)


if __name__ == "__main__":
    main()
