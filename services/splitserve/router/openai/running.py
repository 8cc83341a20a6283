"""Running generations: their events gathered in one place, and the client watched meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

from starlette.types import Receive

from splitserve.router.generation import Generation, GenerationEvent, Generator, Submission
from splitserve.router.http_errors import ClientGone

Arrival = tuple[int, GenerationEvent, float]  # prompt, event, when it came

T = TypeVar("T")


class Inbox:
    """Events of several generations in the order of arrival, however slowly they are taken out."""

    def __init__(self, generations: Sequence[Generation]) -> None:
        self._generations = generations
        self._arrived: list[Arrival] = []
        self._wake = asyncio.Event()
        self._fault: BaseException | None = None
        self._open = len(generations)

    @property
    def cached_tokens(self) -> int:
        return sum(generation.cached_tokens for generation in self._generations)

    def stop(self, prompt: int, choice: int) -> None:
        self._generations[prompt].stop(choice)

    async def take(self) -> list[Arrival]:
        """All that has arrived, at least one event. Raises what a generation raised, a fault of ours."""
        while not self._arrived:
            if self._fault is not None:
                raise self._fault
            if not self._open:
                raise RuntimeError("a generation's events ended without Done")
            self._wake.clear()
            await self._wake.wait()
        arrived, self._arrived = self._arrived, []
        return arrived

    async def pump(self, prompt: int) -> None:
        """Put one generation's events in."""
        async for event in self._generations[prompt].events():
            self._arrived.append((prompt, event, time.monotonic()))
            self._wake.set()

    def ended(self, pump: asyncio.Task[None]) -> None:
        """Called when a pump is done: a fault of it reaches whoever takes."""
        self._open -= 1
        if not pump.cancelled():
            self._fault = self._fault or pump.exception()
        self._wake.set()


@asynccontextmanager
async def generating(generator: Generator, submissions: Sequence[Submission]) -> AsyncGenerator[Inbox, None]:
    """Submit all, gather their events, and end all of them on leaving. Raises what `submit` raises."""
    async with AsyncExitStack() as stack:
        generations = [await stack.enter_async_context(generator.submit(one)) for one in submissions]
        inbox = Inbox(generations)
        pumps = [asyncio.create_task(inbox.pump(n), name=f"pump {one.rid}") for n, one in enumerate(submissions)]
        for pump in pumps:
            pump.add_done_callback(inbox.ended)
        try:
            yield inbox
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; when the client leaves first, `work` is cancelled and ClientGone raised."""
    task = asyncio.create_task(work, name="answer")
    watch = asyncio.create_task(_disconnected(receive), name="disconnect watch")
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        await _cancelled(task)
        raise ClientGone
    finally:
        await _cancelled(task)
        await _cancelled(watch)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
