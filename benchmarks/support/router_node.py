"""A mixed node without an engine, for ``benchmarks/router_throughput.py``: ``python router_node.py CONTROL_ADDRESS``.

The pace of a request is its seed: microseconds per step, 0 for steps without pause. All requests of one pace take their
steps together, with one message per step. Token ``i`` of an answer is letter ``i % 26`` of the alphabet.
"""

from __future__ import annotations

import sys
import time
from string import ascii_lowercase

import msgpack
import zmq

from kvrelay.protocol.codec import decode, encode
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.ids import NodeId, peer_id
from kvrelay.protocol.messages.base import Heartbeat, Load
from kvrelay.protocol.messages.node_to_router import Register
from kvrelay.protocol.messages.router_to_node import Abort, Generate, RegisterAgain
from kvrelay.protocol.request import RequestSpec
from kvrelay.runtime.gc_tuning import tune_gc
from kvrelay.tokenizer.plain import plain_tokens

GEOMETRY = KVGeometry(
    num_layers=1, num_kv_heads=1, head_dim=8, block_size=16, dtype="float32", model_digest="fake-1024"
)
HEARTBEAT_S = 1.0
LETTERS: list[int] = plain_tokens(1024).encode(ascii_lowercase).ids


class Node:
    """Answers over one connection."""

    def __init__(self, address: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, f"{peer_id(NodeId('m0'), 'a')}/benchmark".encode())
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)
        self._groups: dict[int, dict[tuple[str, int], list[int]]] = {}
        self._due_s: dict[int, float] = {}
        self._single: list[tuple[float, RequestSpec]] = []
        self._heartbeat_s = 0.0

    def run(self) -> None:
        """Serve until killed."""
        self._register()
        while True:
            now = time.monotonic()
            if now >= self._heartbeat_s:
                self._socket.send(encode(Heartbeat(load=Load(free_blocks=1 << 20))))
                self._heartbeat_s = now + HEARTBEAT_S
            next_s = min([self._heartbeat_s, *self._due_s.values(), *(at_s for at_s, _ in self._single[:1])])
            if self._socket.poll(int(max(0.0, next_s - now) * 1e3)):
                self._read()
            now = time.monotonic()
            while self._single and self._single[0][0] <= now:
                self._answer_at_once(self._single.pop(0)[1])
            for pace, due_s in list(self._due_s.items()):
                if due_s <= now:
                    self._step(pace, now)

    def _register(self) -> None:
        registration = Register(
            node_id=NodeId("m0"), incarnation="a", role="mixed", address="tcp://127.0.0.1:1", pid=1, model="demo",
            max_model_len=1 << 20, max_num_seqs=1 << 12, num_blocks=1 << 20, geometry=GEOMETRY,
        )  # fmt: skip
        self._socket.send(encode(registration))

    def _read(self) -> None:
        while self._socket.poll(0):
            message = decode(self._socket.recv())
            match message:
                case Generate(request=spec):
                    self._take(spec)
                case Abort(request_id=request_id, epoch=epoch):
                    for group in self._groups.values():
                        group.pop((request_id, epoch), None)
                case RegisterAgain():
                    self._register()

    def _take(self, spec: RequestSpec) -> None:
        pace = spec.sampling.seed
        if spec.sampling.max_tokens == 1:
            self._single.append((time.monotonic() + pace / 1e6, spec))
            self._single.sort(key=lambda item: item[0])
            return
        self._groups.setdefault(pace, {})[spec.request_id, spec.epoch] = [0, spec.sampling.max_tokens]
        self._due_s.setdefault(pace, time.monotonic() + pace / 1e6)

    def _answer_at_once(self, spec: RequestSpec) -> None:
        self._send([_output(spec.request_id, spec.epoch, 0, "length")])

    def _step(self, pace: int, now: float) -> None:
        group, outputs, ended = self._groups[pace], [], []
        for key, state in group.items():
            index, last = state
            state[0] += 1
            outputs.append(_output(*key, index, "length" if index + 1 == last else None))
            if index + 1 == last:
                ended.append(key)
        for key in ended:
            del group[key]
        if outputs:
            self._send(outputs)
        self._due_s[pace] = max(self._due_s[pace] + pace / 1e6, now)
        if not group:
            del self._groups[pace], self._due_s[pace]

    def _send(self, outputs: list[dict[str, object]]) -> None:
        self._socket.send(msgpack.packb(["TokensOut", {"outputs": outputs}]))  # waits while the router is behind


def _output(request_id: str, epoch: int, index: int, finish_reason: str | None) -> dict[str, object]:
    return {
        "request_id": request_id, "epoch": epoch, "index": index, "token_ids": [LETTERS[index % 26]], "logprobs": [],
        "finish_reason": finish_reason, "stop_token_id": None, "num_cached_tokens": 0,
    }  # fmt: skip


if __name__ == "__main__":
    tune_gc()
    Node(sys.argv[1]).run()
