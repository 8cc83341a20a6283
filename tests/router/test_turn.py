"""What is put off to the loop's next turn happens there, in order, and one failure costs no other."""

from __future__ import annotations

import asyncio
import logging

import pytest

from splitserve.router.turn import Turn


async def test_what_is_given_in_one_turn_happens_in_the_next_and_in_order() -> None:
    turn, done = Turn(), list[str]()
    turn.soon(lambda: done.append("a"))
    turn.soon(lambda: done.append("b"))
    assert done == []
    await asyncio.sleep(0)
    assert done == ["a", "b"]


async def test_what_is_given_meanwhile_waits_for_all_that_was_there_before() -> None:
    turn, done = Turn(), list[str]()

    def make(name: str) -> None:
        done.append(f"make {name}")
        turn.soon(lambda: done.append(f"write {name}"))

    turn.soon(lambda: make("a"))
    turn.soon(lambda: make("b"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert done == ["make a", "make b", "write a", "write b"]


async def test_what_raises_is_logged_and_costs_no_other_its_turn(caplog: pytest.LogCaptureFixture) -> None:
    turn, done = Turn(), list[str]()
    turn.soon(lambda: done.remove("nothing"))
    turn.soon(lambda: done.append("b"))
    with caplog.at_level(logging.ERROR, "splitserve.router"):
        await asyncio.sleep(0)
    assert done == ["b"]
    assert [record.exc_info is not None for record in caplog.records] == [True]
