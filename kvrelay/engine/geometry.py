"""Computes the geometry of a node's KV without running the model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from kvrelay.config.cluster_config import Sections
from kvrelay.engine.checkpoint import Checkpoint
from kvrelay.engine.decoder_config import DecoderConfig, read_decoder_config
from kvrelay.engine.fake import fake_geometry
from kvrelay.errors import CheckpointError
from kvrelay.protocol.geometry import KVGeometry


def checkpoint_geometry(node: Sections, checkpoint: Checkpoint, kv_dtype: str, max_model_len: int) -> KVGeometry:
    """Return the geometry of the KV that ``node`` computes. All of ``checkpoint`` must have been read."""
    config, quantization = checkpoint.config, node.engine.quantization
    more: list[object] = [max_model_len if config.rope.kind == "dynamic" else None]
    if quantization != "none":
        more.append(quantization)
    return KVGeometry(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=node.cache.block_size,
        dtype=kv_dtype,
        model_digest=checkpoint.digest(*more),
    )


def dummy_geometry(node: Sections, config: DecoderConfig, dtype: str, max_model_len: int) -> KVGeometry:
    """Return the geometry of the KV that ``node`` computes with random weights, which depend on the kind of device."""
    quantization = node.engine.quantization
    model = ("dummy", node.engine.device, dtype, config, max_model_len if config.rope.kind == "dynamic" else None)
    more: list[str] = [quantization] if quantization != "none" else []
    if node.engine.framework == "paddle":
        more.append("paddle")  # which draws other numbers
    return KVGeometry(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=node.cache.block_size,
        dtype=dtype,
        model_digest=hashlib.sha256(repr((*model, *more)).encode()).hexdigest()[:32],
    )


def node_geometry(node: Sections, on_progress: Callable[[int, int], None]) -> KVGeometry:
    """Return the geometry that a node with these sections has on this machine; reads all of its checkpoint.

    Paddle is imported only if the type of the KV depends on what this CPU computes fast. ``on_progress`` is called
    with (bytes read, total bytes). Raises CheckpointError if the model's files cannot be used.
    """
    if node.engine.kind == "fake":
        return fake_geometry(node.engine.fake, node.cache.block_size)
    model_dir = Path(node.model.path)
    config = read_decoder_config(model_dir)
    if node.model.load_format == "dummy":
        return dummy_geometry(node, config, device_dtype(node), longest_sequence(node, config))
    checkpoint = Checkpoint.open(model_dir, config, on_progress)
    checkpoint.read_all()
    dtype = _kv_dtype(node, checkpoint.dtype)
    return checkpoint_geometry(node, checkpoint, dtype, longest_sequence(node, config))


def device_dtype(node: Sections) -> str:
    """Return the type that a device engine computes in. By default: bfloat16 on a GPU, float32 on a CPU."""
    if node.model.dtype != "auto":
        return node.model.dtype
    return "bfloat16" if node.engine.device == "gpu" else "float32"


def _kv_dtype(node: Sections, stored_dtype: str) -> str:
    """Return the type ``choice.choose_kernels`` decides on, unless it refuses what is asked for."""
    if node.cache.dtype != "auto":
        return node.cache.dtype
    if node.engine.framework is not None or node.engine.device == "gpu":
        return device_dtype(node)
    wanted = stored_dtype if node.model.dtype == "auto" else node.model.dtype
    if node.engine.kernels == "portable" or wanted != "bfloat16":
        return "float32"
    from kvrelay.engine.select_kernels import has_native_bfloat16  # noqa: PLC0415

    return "bfloat16" if has_native_bfloat16() else "float32"


def longest_sequence(node: Sections, config: DecoderConfig) -> int:
    """Return the maximum length of a sequence: the configured one, else the model's."""
    asked, rope = node.model.max_model_len, config.rope
    longest = config.max_position_embeddings
    if rope.kind in ("linear", "dynamic", "yarn"):
        longest = max(longest, int(rope.original_max_position * rope.factor))
    if asked is not None and asked > longest:
        raise CheckpointError(f"model.max_model_len {asked} is more than the {longest} the checkpoint is made for")
    return asked or config.max_position_embeddings
