"""A node that computes a long chunk still takes its messages."""

from __future__ import annotations

import pytest
from support.world import World

from kvrelay.protocol.ids import RequestId

NOTICED_S = 0.01


@pytest.mark.fault("F21")
def test_the_end_of_a_transfer_is_noticed_in_the_middle_of_a_long_chunk() -> None:
    """P's blocks are free, and D decodes, long before the chunk of the other prompt is done."""
    with World(engine={"prefill_token_s": 0.05, "eos_every": 0}) as world:
        world.link.delay("KVFrame", 0.5)
        client = world.submit(5, 12)
        world.run_until_sent("KVFrame")
        other = world.submit(60, 2)
        world.run_until_arrived("FrameAck", 2)  # one frame a layer
        acknowledged_s = world.now
        requests = world.nodes["p0"].machine.requests
        world.run_until(lambda: all(request.spec.request_id != client.request_id for request in requests))
        assert world.now - acknowledged_s < NOTICED_S
        world.run_until(lambda: client.ended)
        assert other.token_ids == [], "the chunk is still being computed"
        assert RequestId(other.request_id) in {request.spec.request_id for request in requests}
