"""The client of the router's benchmark: it asks again as soon as it was answered, and counts what failed."""

from __future__ import annotations

import asyncio

from bench.stream_client import Stream

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
WHOLE = [HEAD, b"e\r\ndata: [DONE]\n\n\r\n", b"0\r\n", b"\r\n"]
CUT_SHORT = [HEAD, b"5\r\nhello\r\n0\r\n\r\n"]


async def ends_of(*answers: list[bytes]) -> list[bool]:
    """What a client reports of a server that gives these answers, one a request, and then hangs up on the next."""
    rest = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n") and rest:
            for part in rest.pop(0):
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.01)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        asked = len(answers) + 1
        ended = asyncio.Queue[bool]()
        request, todo = b"GET / HTTP/1.1\r\n\r\n", list(range(asked))
        port = server.sockets[0].getsockname()[1]
        transport, _ = await asyncio.get_running_loop().create_connection(
            lambda: Stream(request, todo, ended), "127.0.0.1", port
        )
        async with asyncio.timeout(10):
            found = [await ended.get() for _ in range(asked)]
        transport.close()
        return found


async def test_a_stream_is_good_when_its_mark_of_the_end_came_and_is_found_in_pieces():
    assert await ends_of(WHOLE, WHOLE) == [True, True, False]


async def test_a_stream_without_the_mark_and_a_lost_connection_have_failed():
    assert await ends_of(CUT_SHORT) == [False, False]
