"""A server without a model: streams a fixed number of chunks per request, each after ``step_s``. Prints its port."""

from __future__ import annotations

import asyncio
import sys

import uvloop

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def _framed(event: bytes) -> bytes:
    data = b"data: " + event + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


def _chunk(number: int) -> bytes:
    return _framed(
        b'{"id":"cmpl-1","object":"text_completion","created":1,"model":"mock","choices":[{"index":0,'
        b'"text":" token%d","logprobs":null,"finish_reason":null}]}' % number
    )


async def _answer(writer: asyncio.StreamWriter, num_chunks: int, step_s: float) -> None:
    loop = asyncio.get_running_loop()
    writer.write(_HEAD)
    at_s = loop.time()
    for number in range(num_chunks):
        at_s += step_s
        if (delay_s := at_s - loop.time()) > 0:
            await asyncio.sleep(delay_s)
        writer.write(_chunk(number))
        await writer.drain()
    usage = b'{"id":"cmpl-1","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":%d}}' % num_chunks
    writer.write(_framed(usage) + _framed(b"[DONE]") + b"0\r\n\r\n")


async def _serve(num_chunks: int, step_s: float) -> None:
    async def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n") if b":" in line)
                await reader.readexactly(int(lines.get(b"content-length", b"0")))
                await _answer(writer, num_chunks, step_s)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(on_client, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), float(sys.argv[2])))
