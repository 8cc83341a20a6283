"""Running generations: their events gathered in one place, and the client watched meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from starlette.types import Receive

from splitserve.router.generation import Generation, GenerationEvent, Generator, Submission
from splitserve.router.http_errors import ClientGone
from splitserve.router.turn import Turn

Arrival = tuple[int, GenerationEvent, float]  # prompt, event, when it came

T = TypeVar("T")


class Inbox:
    """Events of several generations in the order of arrival, however slowly they are taken out: what has piled up
    meanwhile is taken at once, so that under load it becomes one write.

    Who takes them is called in `turn`, and no task is woken for a token: that cost more than its text did.
    """

    __slots__ = ("_arrived", "_generations", "_take", "_taken", "_turn")

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._generations: list[Generation] = []
        self._arrived: list[Arrival] = []  # while somebody takes: not empty means that `_hand_over` is due
        self._take: Callable[[list[Arrival]], bool] | None = None
        self._taken = asyncio.get_running_loop().create_future()

    def cached_tokens(self, prompt: int) -> int:
        """Of a prompt that was submitted."""
        return self._generations[prompt].cached_tokens

    async def open(self, generator: Generator, submission: Submission, stack: AsyncExitStack) -> None:
        """Submit, and hear its events from now until `stack` closes. Raises what `submit` raises."""
        hear = partial(self._hear, len(self._generations))
        self._generations.append(await stack.enter_async_context(generator.submit(submission, hear)))

    def stop(self, prompt: int, choice: int) -> None:
        self._generations[prompt].stop(choice)

    async def each(self, take: Callable[[list[Arrival]], bool]) -> None:
        """Call `take` with all that has arrived, each time something has, until it says False; what it raises is raised."""
        self._take, self._taken = take, asyncio.get_running_loop().create_future()
        if self._arrived:
            self._turn.soon(self._hand_over)
        try:
            await self._taken
        finally:
            self._take = None

    def _hear(self, prompt: int, event: GenerationEvent) -> None:
        if self._take is not None and not self._arrived:
            self._turn.soon(self._hand_over)  # not at once: more of the same moment may follow
        self._arrived.append((prompt, event, time.monotonic()))

    def _hand_over(self) -> None:
        if self._take is None or self._taken.done() or not self._arrived:
            return
        arrived, self._arrived = self._arrived, []
        try:
            more = self._take(arrived)
        except Exception as error:  # noqa: BLE001  # it is for who waits
            self._taken.set_exception(error)
            return
        if not more:
            self._taken.set_result(None)


@asynccontextmanager
async def generating(
    generator: Generator, submissions: Sequence[Submission], inbox: Inbox
) -> AsyncGenerator[None, None]:
    """Submit all, have `inbox` hear their events, and end all of them on leaving. Raises what `submit` raises."""
    async with AsyncExitStack() as stack:
        for number, submission in enumerate(submissions):
            if number:
                await asyncio.sleep(0)  # of a thousand prompts each is a millisecond's work: others have their turn
            await inbox.open(generator, submission, stack)
        yield


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
