"""Creates the engine that a node's config names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvrelay.config.cluster_config import NodeConfig
from kvrelay.engine.fake import FakeEngine
from kvrelay.engine.interface import Engine
from kvrelay.errors import ConfigError
from kvrelay.grammar.masks import GrammarMasks
from kvrelay.runtime.startup import startup

OnProgress = Callable[[int, int], None]


def load_engine(node: NodeConfig, on_progress: OnProgress) -> Engine:
    """Return the engine of ``node``, ready to run. A fake engine does not import Paddle.

    ``on_progress`` is called with (bytes read, total bytes) while a checkpoint is read. Raises CheckpointError if the
    model cannot be loaded as configured.
    """
    if node.engine.kind == "fake":
        return _fake_engine(node)
    if node.engine.framework is not None:
        return _load_device_engine(node, on_progress)
    if node.model.load_format == "dummy":
        raise ConfigError(["model.load_format: dummy needs engine.kind: torch or paddle-device"])
    return _load_paddle_engine(node, on_progress)


def _fake_engine(node: NodeConfig) -> FakeEngine:
    fake, model_dir = node.engine.fake, Path(node.model.path)
    has_tokenizer = (model_dir / "tokenizer.json").is_file()
    grammars = GrammarMasks(fake.vocab_size, model_dir if has_tokenizer else None)
    return FakeEngine(fake, node.cache.block_size, node.cache.fixed_num_blocks, grammars=grammars)


def _load_device_engine(node: NodeConfig, on_progress: OnProgress) -> Engine:
    """Load a checkpoint with the device engine, which imports one framework. Raises ConfigError if it is missing."""
    from kvrelay.engine.device.load import load_device_engine  # noqa: PLC0415

    try:
        return load_device_engine(node, on_progress)
    except ModuleNotFoundError as error:
        if error.name == "torch" and node.engine.kind == "torch":
            raise ConfigError(["engine.kind: torch is not installed: pip install 'kvrelay[torch]'"]) from error
        if error.name == "triton":
            raise ConfigError(["engine.device: gpu needs Triton: pip install triton"]) from error
        raise


def _load_paddle_engine(node: NodeConfig, on_progress: OnProgress) -> Engine:
    """Load a checkpoint with the Paddle engine. Imports Paddle."""
    num_blocks = node.cache.fixed_num_blocks
    startup.report("importing Paddle")
    from kvrelay.engine.checkpoint import Checkpoint  # noqa: PLC0415
    from kvrelay.engine.decoder import Decoder, load_weights  # noqa: PLC0415
    from kvrelay.engine.decoder_config import read_decoder_config  # noqa: PLC0415
    from kvrelay.engine.geometry import checkpoint_geometry, longest_sequence  # noqa: PLC0415
    from kvrelay.engine.kernels import HeadShape  # noqa: PLC0415
    from kvrelay.engine.paddle_engine import PaddleEngine  # noqa: PLC0415
    from kvrelay.engine.paddle_runtime import set_device, set_num_threads  # noqa: PLC0415
    from kvrelay.engine.rope import Rotation, inverse_frequencies  # noqa: PLC0415
    from kvrelay.engine.select_kernels import choose_kernels  # noqa: PLC0415

    startup.report("loading weights")
    model_dir = Path(node.model.path)
    config = read_decoder_config(model_dir)
    max_model_len = longest_sequence(node, config)
    checkpoint = Checkpoint.open(model_dir, config, on_progress)
    set_device(node.engine.device)
    set_num_threads(node.threads)
    rotation = Rotation(*inverse_frequencies(config.rope, config.head_dim, max_model_len))
    shape = HeadShape(config.num_heads, config.num_kv_heads, config.head_dim, rotation)
    kernels = choose_kernels(node, checkpoint.dtype, shape)
    weights = load_weights(checkpoint, kernels)
    geometry = checkpoint_geometry(node, checkpoint, kernels.kv_dtype, max_model_len)
    decoder = Decoder(config, weights, kernels)
    grammars = GrammarMasks(config.vocab_size, model_dir)
    grammars.open()
    return PaddleEngine(
        decoder,
        geometry,
        num_blocks,
        config.vocab_size,
        max_model_len,
        grammars,
        staged=node.engine.device != "cpu",
    )
