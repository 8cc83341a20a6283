"""Work on bytes in a thread, which a cancellation stops *and waits for*: afterwards the thread touches nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """Raised inside the thread when it was told to stop; nobody outside sees it."""


class Stop:
    """Tells a thread to stop: it asks `check` between slices; `interrupt` wakes it where it waits."""

    def __init__(self, interrupt: Callable[[], None] | None = None) -> None:
        self._event = threading.Event()
        self._interrupt = interrupt

    def set(self) -> None:
        self._event.set()
        if self._interrupt is not None:
            self._interrupt()

    @property
    def told(self) -> bool:
        """For threads that cannot stop where they are."""
        return self._event.is_set()

    def check(self) -> None:
        if self._event.is_set():
            raise Stopped

    def sleep(self, seconds: float) -> None:
        """Sleep, or stop."""
        if self._event.wait(seconds):
            raise Stopped


async def in_thread(
    executor: Executor,
    work: Callable[[Stop], T],
    *,
    interrupt: Callable[[], None] | None = None,
    discard: Callable[[T], None] | None = None,
) -> T:
    """`work(stop)` in a thread of `executor`. When cancelled: stop it, wait until it is out, `discard` a result that
    came too late, and only then let the cancellation go on."""
    stop = Stop(interrupt)
    task = executor.submit(work, stop)
    outcome = asyncio.wrap_future(task)
    try:
        return await asyncio.shield(outcome)
    except asyncio.CancelledError:
        stop.set()
        task.cancel()  # takes it off the queue if it has not begun
        await _settled(outcome)
        if not outcome.cancelled() and outcome.exception() is None and discard is not None:
            discard(outcome.result())
        raise


async def _settled(outcome: asyncio.Future[T]) -> None:
    while not outcome.done():
        try:
            await asyncio.wait([outcome])
        except asyncio.CancelledError:
            continue  # a second cancellation changes nothing: the thread is on its way out, and the first is re-raised
