"""The frameworks that a device engine runs on. Only the one that is asked for is imported."""

from __future__ import annotations

from typing import Literal

from kvrelay.engine.device.framework import Framework
from kvrelay.engine.device.operations import OperationLimits, Operations
from kvrelay.engine.kernels import HeadShape


def make_framework(name: Literal["torch", "paddle"], device: str, threads: int = 1) -> Framework:
    """Return the framework for ``device``: ``gpu``, or ``cpu`` with ``threads`` threads.

    Call before Triton is imported. Raises EngineError if the framework finds no GPU, ModuleNotFoundError without it.
    """
    if name == "torch":
        from kvrelay.engine.device.torch_framework import TorchFramework  # noqa: PLC0415

        return TorchFramework(device, threads)
    from kvrelay.engine.device.paddle_framework import PaddleFramework  # noqa: PLC0415

    return PaddleFramework(device, threads)


def own_operations(framework: Framework, heads: HeadShape, limits: OperationLimits) -> Operations:
    """Return operations by the framework's own operators, for a CPU."""
    if framework.name == "torch":
        from kvrelay.engine.device.torch_operations import TorchOperations  # noqa: PLC0415

        return TorchOperations(framework, heads, limits)
    from kvrelay.engine.device.paddle_operations import PaddleOperations  # noqa: PLC0415

    return PaddleOperations(framework, heads, limits)
