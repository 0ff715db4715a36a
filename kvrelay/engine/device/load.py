"""Creates a device engine: from a node's config, or of any shape with random weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from kvrelay.engine.checkpoint import Checkpoint
from kvrelay.engine.decoder import DecoderWeights, load_weights
from kvrelay.engine.decoder_config import DecoderConfig, read_decoder_config
from kvrelay.engine.device.engine import DeviceEngine
from kvrelay.engine.device.framework import Framework
from kvrelay.engine.device.frameworks import make_framework, own_operations
from kvrelay.engine.device.graphs import decode_sizes
from kvrelay.engine.device.launcher import DeviceEngineLimits
from kvrelay.engine.device.operations import OperationLimits, Operations, QuantizingOperations
from kvrelay.engine.device.pool_size import num_blocks_that_fit
from kvrelay.engine.device.projections import Float8Projections, FrameworkProjections, Projections
from kvrelay.engine.device.weights import DevicePacking, Quantize, RandomWeights
from kvrelay.engine.kernels import HeadShape
from kvrelay.engine.rope import Rotation, inverse_frequencies
from kvrelay.errors import CheckpointError, ConfigError
from kvrelay.grammar.masks import GrammarMasks
from kvrelay.protocol.geometry import KVGeometry

if TYPE_CHECKING:
    from kvrelay.config.cluster_config import NodeConfig

logger = logging.getLogger(__name__)

CHUNK_GRAPHS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Prefill steps of up to so many tokens are graphs on a GPU where their launches would take longer than they do."""

LAYER_LAUNCH_SECONDS = 0.5e-3
"""What launching one layer kernel by kernel took on hosts of an H100 and an H200: 0.35 to 0.6 ms; see docs/gpu.md."""

FLOPS_PER_SECOND = 5e14
"""What the GEMMs of a few hundred tokens reached there."""

GATHERED_FROM = 512
"""Tokens of a chunk from which its context is gathered: on an H100 that pays from about 250 at contexts of 2,048
tokens and 500 at 8,192.
"""


@dataclass(frozen=True, slots=True)
class DeviceOptions:
    """Where and in what type to compute. ``interpreted``: Triton's kernels on a CPU, by its interpreter.

    ``fp8``: linear layers in float8. ``deterministic``: the same bits in any batch, by kernels; not with ``fp8``.
    """

    device: str
    dtype: str
    block_size: int
    interpreted: bool = False
    fp8: bool = False
    deterministic: bool = False

    @property
    def has_kernels(self) -> bool:
        """Whether Triton's kernels compute, and not torch's operators."""
        return self.device == "gpu" or self.interpreted


def load_device_engine(node: NodeConfig, on_progress: Callable[[int, int], None]) -> DeviceEngine:
    """Return the engine of ``node`` with its checkpoint loaded, ready to run. Raises CheckpointError or ConfigError."""
    # scripts/gpu-check uses the rest of this module where the config's packages are not installed
    from kvrelay.engine.geometry import (  # noqa: PLC0415
        checkpoint_geometry,
        device_dtype,
        dummy_geometry,
        longest_sequence,
    )

    model_dir = Path(node.model.path)
    config = read_decoder_config(model_dir)
    max_model_len = longest_sequence(node, config)
    dtype = device_dtype(node)
    if node.cache.dtype not in ("auto", dtype):
        raise CheckpointError(f"cache.dtype {node.cache.dtype}: the KV cache is of the type of compute, {dtype}")
    is_gpu = node.engine.device == "gpu"
    if node.engine.framework == "paddle" and not is_gpu and dtype != "float32":
        raise ConfigError([f"model.dtype {dtype}: on a CPU Paddle computes float32 only"])
    limits = DeviceEngineLimits(
        num_blocks=0 if is_gpu and node.cache.num_blocks == "auto" else node.cache.fixed_num_blocks,
        max_model_len=max_model_len,
        max_num_seqs=node.scheduler.max_num_seqs,
        max_num_batched_tokens=node.scheduler.max_num_batched_tokens,
        decode_graphs=() if node.role == "prefill" else decode_sizes(node.scheduler.max_num_seqs),
        chunk_graphs=chunk_graphs(config, node.scheduler.max_num_batched_tokens) if is_gpu else (),
        device_pool=is_gpu or node.transfer.link == "cuda",
        digests=node.role == "prefill",
    )
    framework = make_framework(node.engine.framework or "torch", node.engine.device, node.threads)
    options = DeviceOptions(
        node.engine.device, dtype, node.cache.block_size, fp8=node.engine.quantization == "fp8",
        deterministic=node.engine.deterministic,
    )  # fmt: skip
    quantize = quantizer(framework, config, options)
    if node.model.load_format == "dummy":
        weights = RandomWeights(framework, config, dtype, quantize).make()
        geometry = dummy_geometry(node, config, dtype, max_model_len)
    else:
        checkpoint = Checkpoint.open(model_dir, config, on_progress)
        weights = load_weights(checkpoint, DevicePacking(framework, dtype, quantize))
        geometry = checkpoint_geometry(node, checkpoint, dtype, max_model_len)

    def build(limits: DeviceEngineLimits) -> DeviceEngine:
        grammars = GrammarMasks(config.vocab_size, model_dir)
        return build_engine(config, weights, geometry, framework, limits, options, grammars)

    if node.cache.num_blocks == "auto":
        share = node.cache.device_memory_share
        num_blocks = num_blocks_that_fit(build, framework, geometry, limits, share)
        logger.info("cache.num_blocks: auto: %d blocks, %d tokens", num_blocks, num_blocks * geometry.block_size)
        limits = replace(limits, num_blocks=num_blocks)
    engine = build(limits)
    engine.grammars.open()
    return engine


def chunk_graphs(config: DecoderConfig, max_num_tokens: int) -> tuple[int, ...]:
    """Return of how many tokens prefill steps of a model are graphs: up to where launches no longer bound them."""
    matrices = config.hidden_size * (
        config.qkv_size + config.num_heads * config.head_dim + 3 * config.intermediate_size
    )
    most = LAYER_LAUNCH_SECONDS * FLOPS_PER_SECOND / (2 * matrices)
    return tuple(size for size in CHUNK_GRAPHS if size <= min(most, max_num_tokens))


def random_engine(config: DecoderConfig, limits: DeviceEngineLimits, options: DeviceOptions) -> DeviceEngine:
    """Return an engine with random weights made on the device; nothing is read."""
    framework = make_framework("torch", options.device)
    geometry = KVGeometry(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=options.block_size,
        dtype=options.dtype,
        model_digest="random",
    )
    weights = RandomWeights(framework, config, options.dtype, quantizer(framework, config, options)).make()
    return build_engine(config, weights, geometry, framework, limits, options)


def build_engine(
    config: DecoderConfig,
    weights: DecoderWeights,
    geometry: KVGeometry,
    framework: Framework,
    limits: DeviceEngineLimits,
    options: DeviceOptions,
    grammars: GrammarMasks | None = None,
) -> DeviceEngine:
    """Return an engine of its parts, compiled and with its graphs captured."""
    operations = make_operations(config, framework, limits, options)
    projections = make_projections(config, framework, operations, options)
    engine = DeviceEngine(config, weights, geometry, framework, operations, projections, limits, grammars)
    engine.warm_up()
    return engine


def make_operations(
    config: DecoderConfig, framework: Framework, limits: DeviceEngineLimits, options: DeviceOptions
) -> Operations:
    """Return Triton's kernels on a GPU, or interpreted, and the framework's own operators on a CPU."""
    rotation = Rotation(*inverse_frequencies(config.rope, config.head_dim, limits.max_model_len))
    heads = HeadShape(config.num_heads, config.num_kv_heads, config.head_dim, rotation)
    whole = all(window is None for window in config.windows)
    # several contexts lose a little room each, since they begin at multiples of some tokens
    gathered = max(limits.max_model_len, limits.max_num_batched_tokens * 9 // 8) + 64 if whole else 0
    sizes = OperationLimits(
        dtype=options.dtype,
        block_size=options.block_size,
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        gathered=gathered,
        gathered_from=max(GATHERED_FROM, 1 + max(limits.chunk_graphs, default=0)),  # graphs have no room for them
    )
    if not options.has_kernels:
        return own_operations(framework, heads, sizes)
    if options.deterministic:
        from kvrelay.engine.device.invariant import InvariantOperations  # noqa: PLC0415

        return InvariantOperations(framework, heads, sizes)
    from kvrelay.engine.device.triton_operations import TritonOperations  # noqa: PLC0415

    return TritonOperations(framework, heads, sizes)


def make_projections(
    config: DecoderConfig, framework: Framework, operations: Operations, options: DeviceOptions
) -> Projections:
    """Return the linear layers as ``options`` want them computed."""
    eps = config.rms_norm_eps
    if options.deterministic:
        from kvrelay.engine.device.invariant import InvariantProjections  # noqa: PLC0415

        return InvariantProjections(framework, operations, eps, options.dtype)
    if options.fp8:
        return Float8Projections(framework, cast(QuantizingOperations, operations), eps, options.dtype)
    if options.has_kernels and options.dtype != "float32":
        from kvrelay.engine.device.single_row import SingleRowProjections  # noqa: PLC0415

        return SingleRowProjections(framework, operations, eps, options.dtype)
    return FrameworkProjections(framework, operations, eps)


def quantizer(framework: Framework, config: DecoderConfig, options: DeviceOptions) -> Quantize | None:
    """Return what quantizes the weights, None if they are not. Raises ConfigError if this device or model cannot."""
    if not options.fp8:
        return None
    _check_fp8(framework, config, options.dtype)
    if not options.has_kernels:
        from kvrelay.engine.device.torch_operations import quantized_rows  # noqa: PLC0415

        return quantized_rows
    from kvrelay.engine.device import triton_operations  # noqa: PLC0415

    return partial(triton_operations.quantized_rows, framework)


def _check_fp8(framework: Framework, config: DecoderConfig, dtype: str) -> None:
    """Raise ConfigError unless the framework's scaled GEMM takes the model's weights."""
    sizes = (config.hidden_size, config.intermediate_size, config.qkv_size, config.num_heads * config.head_dim)
    problems = [
        (not framework.has_fp8, "needs torch, and a GPU of compute capability 8.9 or higher"),
        (framework.is_gpu and dtype != "bfloat16", f"computes in bfloat16, not model.dtype {dtype}"),
        (
            framework.is_gpu and any(size % 16 for size in sizes),
            f"needs layers whose sizes are multiples of 16, not {sizes}",
        ),
    ]
    if found := [f"engine.quantization: fp8 {problem}" for is_one, problem in problems if is_one]:
        raise ConfigError(found)
