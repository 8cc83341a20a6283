"""How what generations tell reaches who writes it: all of a moment at once, without a task being woken for it."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from splitserve.protocol.params import SamplingParams
from splitserve.router.generation import Generation, GenerationEvent, Hear, Submission, Tokens
from splitserve.router.openai.running import Arrival, Inbox
from splitserve.router.turn import Turn


class Told:
    """A generator of generations that say what a test has them say."""

    cached_tokens = 0

    def submit(self, submission: Submission, hear: Hear) -> Generation:
        self.hear = hear
        return self

    def stop(self, choice: int) -> None: ...

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(self, *exc: object) -> None: ...


def token(index: int) -> GenerationEvent:
    return Tokens(0, index, (7,))


async def opened(stack: AsyncExitStack) -> tuple[Inbox, Told]:
    inbox, told = Inbox(Turn()), Told()
    await inbox.open(told, Submission("r", "m", (1,), SamplingParams(max_tokens=9), (0,), 1.0), stack)
    return inbox, told


async def test_what_arrives_in_one_moment_is_taken_at_once_and_what_came_before_anybody_took_it_too():
    async with AsyncExitStack() as stack:
        inbox, told = await opened(stack)
        told.hear(token(0))
        taken: list[list[GenerationEvent]] = []

        def take(arrived: list[Arrival]) -> bool:
            taken.append([event for _, event, _ in arrived])
            if len(taken) == 1:
                told.hear(token(1))
                told.hear(token(2))
            return len(taken) < 2

        async with asyncio.timeout(5):
            await inbox.each(take)
        assert taken == [[token(0)], [token(1), token(2)]]


async def test_what_arrives_while_nobody_takes_waits_for_the_next_who_does():
    async with AsyncExitStack() as stack:
        inbox, told = await opened(stack)
        told.hear(token(0))
        async with asyncio.timeout(5):
            await inbox.each(lambda arrived: False)
            told.hear(token(1))
            await asyncio.sleep(0)
            taken: list[Arrival] = []
            await inbox.each(lambda arrived: bool(taken.extend(arrived)))
        assert [event for _, event, _ in taken] == [token(1)]


async def test_what_taking_raises_is_raised_where_it_is_waited_for():
    def take(arrived: list[Arrival]) -> bool:
        raise ValueError("not to be taken")

    async with AsyncExitStack() as stack:
        inbox, told = await opened(stack)
        told.hear(token(0))
        with pytest.raises(ValueError, match="not to be taken"):
            await inbox.each(take)
