"""``transfer.link: auto`` takes the fastest link that both ends can use, and says why it is not a faster one."""

from __future__ import annotations

import logging

import pytest
from messager_pair import D, P, Pair, one_of_each

from kvrelay.config.sections import LINK_KINDS
from kvrelay.protocol.ids import Attempt, RequestId
from kvrelay.protocol.messages.messager_to_node import TransferDone

A = Attempt(RequestId("a"), 1)
NO_NIXL = tuple(kind for kind in LINK_KINDS if kind != "nixl")
"""What auto allows where the library NIXL is not installed."""


@pytest.mark.parametrize(
    ("p_on_device", "d_on_device", "hosts", "link", "not_offered", "passed_over"),
    [
        (True, True, "same", "cuda", "shm", "none"),
        (False, False, "same", "shm", "cuda", "none"),
        (True, False, "same", "ipc", "shm", "cuda: this node's pool is not on a device of the kind simulated"),
        (False, True, "same", "ipc", "cuda", "shm: this node's pool is not in host memory"),
        (True, True, "apart", "tcp", "shm", "cuda: not to another host; ipc: not to another host"),
        (False, False, "apart", "tcp", "cuda", "shm: not to another host; ipc: not to another host"),
        (True, False, "apart", "tcp", "shm", "cuda: not to another host; ipc: not to another host"),
        (False, True, "apart", "tcp", "cuda", "shm: not to another host; ipc: not to another host"),
    ],
)
def test_the_fastest_possible_link_is_taken_and_the_log_says_why(
    p_on_device: bool,
    d_on_device: bool,
    hosts: str,
    link: str,
    not_offered: str,
    passed_over: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    there = "here" if hosts == "same" else "there"
    with Pair(
        hosts=("here", there), on_device=p_on_device, links=NO_NIXL, d={"on_device": d_on_device, "links": NO_NIXL}
    ) as pair:
        sources, targets = one_of_each(pair, A)
        pair.signal_all(A, sources)
        pair.open(A, targets)
        pair.run()
        assert [done.link for done in pair.told(P, TransferDone)] == [link]  # type: ignore[attr-defined]
        pair.assert_moved(A)
        opened = [log.fields for log in pair.ends[P].logs if log.event == "link open"]
        assert opened == [{"peer": D, "link": link, "passed_over": passed_over}]
    assert any(text.startswith(f"link not possible kind={not_offered} reason=") for text in caplog.messages)
