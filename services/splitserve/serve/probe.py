"""Whether something answers on a TCP port, told by the first line of its answer."""

from __future__ import annotations

import asyncio
from contextlib import closing

READY_REQUEST = b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
READY_ANSWER = b"HTTP/1.1 200"


async def answers(host: str, port: int, hello: bytes, expect: bytes, timeout_s: float = 2.0) -> bool:
    """Send `hello`; true if a line that starts with `expect` comes back in time."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            with closing(writer):
                writer.write(hello)
                return (await reader.readline()).startswith(expect)
    except (OSError, TimeoutError):
        return False
