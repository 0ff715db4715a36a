"""KV over bare ZMQ: a process that sends views of P's pool, and one that copies received data to D's pool."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
import zmq

from kvrelay.kv_pool.host_memory import KVMemory
from kvrelay.protocol.geometry import KVGeometry
from kvrelay.protocol.kv_handle import KVMemoryHandle


class Chunk(NamedTuple):
    """Consecutive blocks, the same in some layers: ``count`` from ``source`` on in P's pool, ``target`` in D's."""

    layer: int
    num_layers: int
    source: int
    target: int
    count: int  # type: ignore[assignment]  # a tuple has a method of this name


class BareZmq:
    """The two processes, over one kind of link (``ipc`` or ``tcp``)."""

    def __init__(self, sender: Connection, receiver: Connection, pids: list[int]) -> None:
        self._sender = sender
        self._receiver = receiver
        self.pids = pids

    def move(self, chunks: Sequence[Chunk]) -> None:
        """Send ``chunks``, a message of K and V of each layer each; return when all are written."""
        self._sender.send(list(chunks))
        self._receiver.recv()


@contextmanager
def bare_zmq(link: str, address: str, p_pool: KVMemory, d_pool: KVMemory) -> Iterator[BareZmq]:
    """Run the processes between two pools of this process. ``address`` is a free one of that kind of link."""
    context = multiprocessing.get_context("spawn")
    ours_p, theirs_p = context.Pipe()
    ours_d, theirs_d = context.Pipe()
    receiver = context.Process(target=_receive, args=(theirs_d, d_pool.geometry, d_pool.handle, address), name=link)
    sender = context.Process(target=_send, args=(theirs_p, p_pool.geometry, p_pool.handle), name=link)
    receiver.start()
    sender.start()
    try:
        ours_p.send(ours_d.recv())
        ours_p.recv()
        yield BareZmq(ours_p, ours_d, [process.pid for process in (sender, receiver) if process.pid])
    finally:
        ours_p.send(None)
        sender.join()
        receiver.join()


def _send(driver: Connection, geometry: KVGeometry, handle: KVMemoryHandle) -> None:
    with (
        closing(KVMemory.attach(geometry, handle)) as pool,
        zmq.Context() as context,
        context.socket(zmq.PUSH) as socket,
    ):
        socket.connect(driver.recv())
        driver.send("connected")
        while (chunks := driver.recv()) is not None:
            for chunk in chunks:
                layers = pool.planes[chunk.layer : chunk.layer + chunk.num_layers]
                rows = layers[:, :, chunk.source : chunk.source + chunk.count]
                head = repr((len(chunks), *chunk)).encode()
                socket.send_multipart([head, *(row for layer in rows for row in layer)], copy=False)
        socket.send(b"")


def _receive(driver: Connection, geometry: KVGeometry, handle: KVMemoryHandle, address: str) -> None:
    with (
        closing(KVMemory.attach(geometry, handle)) as pool,
        zmq.Context() as context,
        context.socket(zmq.PULL) as socket,
    ):
        socket.bind(address)
        driver.send(socket.getsockopt_string(zmq.LAST_ENDPOINT))
        num_taken = 0
        while parts := (frames := socket.recv_multipart(copy=False))[1:]:
            num_chunks, first, num_layers, _, target, count = (int(n) for n in frames[0].bytes[1:-1].split(b","))
            planes = [plane for layer in pool.planes[first : first + num_layers] for plane in layer]
            for plane, part in zip(planes, parts, strict=True):
                rows = plane[target : target + count]
                np.copyto(rows, np.frombuffer(part.buffer, np.uint8).reshape(rows.shape))
            num_taken += 1
            if num_taken == num_chunks:
                num_taken = 0
                driver.send("written")
