"""What breaks a step is laid to the sequence that causes it; the others are computed without it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from engine_runs import engine_sequence
from support.ids import block_ids

from kvrelay.engine.isolation import OnLayers, compute_isolated
from kvrelay.engine.sequences import ScheduledSequence
from kvrelay.errors import DeviceError
from kvrelay.protocol.messages.engine import SampledTokens, SequenceFailed, SequenceOutcome

GOOD, BAD = 1, 2
TOLD = SampledTokens([7], [])
BROKEN = SequenceFailed("ValueError: out of memory", retryable=True)


@dataclass
class Model:
    """Three layers; a batch with a bad token breaks after ``layers_before`` of them."""

    layers_before: int = 1
    sizes: list[int] = field(default_factory=list)

    def compute(self, batch: list[ScheduledSequence], on_layers: OnLayers) -> list[SequenceOutcome]:
        self.sizes.append(len(batch))
        for layer in range(3):
            if layer == self.layers_before and any(item.token_ids == [BAD] for item in batch):
                raise ValueError("out of memory")
            on_layers(range(layer, layer + 1))
        return [TOLD for _ in batch]


def isolated(model: Model, tokens: list[int]) -> tuple[list[SequenceOutcome], list[int]]:
    """Compute a sequence of each token; return what came of them, and the layers told."""
    layers: list[int] = []
    batch = [ScheduledSequence(engine_sequence([token], block_ids(0)), 0, 1, True, 0) for token in tokens]
    return compute_isolated(3, batch, model.compute, layers.extend), layers


def test_a_sequence_that_breaks_a_step_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert isolated(Model(), [BAD])[0] == [BROKEN]
    assert "step 3 failed" in caplog.text


@pytest.mark.parametrize("place", range(7))
def test_the_others_of_a_step_that_breaks_are_computed_without_the_one_that_breaks_it(place: int) -> None:
    tokens = [GOOD] * 7
    outcomes: list[SequenceOutcome] = [TOLD] * 7
    tokens[place], outcomes[place] = BAD, BROKEN
    model = Model()
    assert isolated(model, tokens)[0] == outcomes
    assert len(model.sizes) <= 2 * 3 + 1  # halves of 7, of 4 or 3, of 2


def test_a_lost_device_is_the_error_of_no_sequence() -> None:
    calls: list[int] = []

    def compute(batch: list[ScheduledSequence], on_layers: OnLayers) -> list[SequenceOutcome]:
        calls.append(len(batch))
        raise DeviceError("an illegal address")

    batch = [ScheduledSequence(engine_sequence([token], block_ids(0)), 0, 1, True, 0) for token in range(4)]
    with pytest.raises(DeviceError, match="an illegal address"):
        compute_isolated(3, batch, compute, lambda layers: None)
    assert calls == [4]


def test_several_that_break_a_step_fail_each_with_an_error_of_its_own() -> None:
    outcomes, _ = isolated(Model(), [BAD, GOOD, GOOD, BAD, BAD])
    assert outcomes == [BROKEN, TOLD, TOLD, BROKEN, BROKEN]


@pytest.mark.parametrize("layers_before", range(3))
def test_a_layer_is_told_once_and_not_before_all_parts_of_the_step_have_it(layers_before: int) -> None:
    outcomes, layers = isolated(Model(layers_before), [GOOD, BAD, GOOD, GOOD])
    assert outcomes == [TOLD, BROKEN, TOLD, TOLD]
    assert layers == [0, 1, 2]


def test_layers_that_nobody_has_are_not_told() -> None:
    assert isolated(Model(), [BAD, BAD]) == ([BROKEN, BROKEN], [0])
