"""Events that are written soon keep their place before whatever is written after them, and are counted once."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Message

from splitserve.router.protocol import CONNECTION
from splitserve.router.sse import EventStream
from splitserve.router.turn import Turn


class Wire:
    """A server's side of one answer: what reaches the socket, by either way."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.full = False
        self.state = {"written": 0}

    def stream(self, turn: Turn) -> EventStream:
        extension = {"write": self.parts.append, "full": lambda: self.full, "abort": lambda: None}
        scope: dict[str, Any] = {"extensions": {CONNECTION: extension}, "state": self.state}
        return EventStream(scope, self._receive, self._send, (), stall_s=5, turn=turn)

    async def _receive(self) -> Message:
        raise AssertionError("nobody asked for more")

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            self.parts.append(message["body"] or b"END")


async def test_what_is_written_soon_goes_out_in_the_next_turn_as_one_part() -> None:
    wire = Wire()
    events = wire.stream(Turn())
    await events.write(b"a")
    assert events.write_soon(b"b")
    assert events.write_soon(b"c")
    assert wire.parts == [b"a"]
    await asyncio.sleep(0)
    assert wire.parts == [b"a", b"bc"]
    assert wire.state["written"] == 3


async def test_what_is_written_after_it_stays_behind_it() -> None:
    wire = Wire()
    events = wire.stream(Turn())
    await events.write(b"a")
    events.write_soon(b"b")
    await events.write(b"c")
    events.write_soon(b"d")
    await events.end()
    await asyncio.sleep(0)
    assert wire.parts == [b"a", b"b", b"c", b"d", b"END"]


async def test_nothing_is_written_soon_before_the_headers_or_to_a_reader_who_lags() -> None:
    wire = Wire()
    events = wire.stream(Turn())
    assert not events.write_soon(b"a")
    await events.write(b"a")
    wire.full = True
    assert not events.write_soon(b"b")
    await asyncio.sleep(0)
    assert wire.parts == [b"a"]
