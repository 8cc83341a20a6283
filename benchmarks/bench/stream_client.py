"""Many streams read as cheaply as may be: `python stream_client.py PORT PATH CONCURRENT REQUESTS BODY`; no body: GET.

For the cost of the server only; it prints the seconds taken and the failed streams as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

TIMEOUT_S = 300
TAIL = 64


class Stream(asyncio.Protocol):
    """A connection that asks again as soon as it was answered."""

    def __init__(self, request: bytes, todo: list[int], ended: asyncio.Queue[bool]) -> None:
        self._request, self._todo, self._ended = request, todo, ended
        self._tail = b""
        self._open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._open = bool(self._todo)
        if self._open:
            self._todo.pop()
            self._tail = b""
            self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._tail = (self._tail + data)[-TAIL:]
        if self._tail.endswith(b"\r\n0\r\n\r\n"):
            self._ended.put_nowait(b"[DONE]" in self._tail)
            self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._open:
            self._ended.put_nowait(False)


async def main() -> None:
    port, path, concurrent, requests, body = sys.argv[1:]
    verb = "POST" if body else "GET"
    request = f"{verb} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    request += f"content-length: {len(body.encode())}\r\n\r\n{body}"
    todo, ended = list(range(int(requests))), asyncio.Queue[bool]()
    began = time.monotonic()
    async with asyncio.timeout(TIMEOUT_S):
        for _ in range(min(int(concurrent), len(todo))):
            await asyncio.get_running_loop().create_connection(
                lambda: Stream(request.encode(), todo, ended), "127.0.0.1", int(port)
            )
        good = [await ended.get() for _ in range(int(requests))]
    print(json.dumps({"seconds": time.monotonic() - began, "failed": good.count(False)}))


if __name__ == "__main__":
    asyncio.run(main())
