"""A process's life: start, signals, exit code. A start-up failure is one line and a code, never a traceback."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable

from splitserve.errors import StartupError, row_of

log = logging.getLogger("splitserve.runtime")

_PR_SET_PDEATHSIG = 1


class Signals:
    """Stop signals of a process. Handlers only record; whoever waits decides (uvicorn's rule)."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._first = asyncio.Event()
        self._second = asyncio.Event()

    def install(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.record, number)

    def record(self, number: int) -> None:
        self.received.append(number)
        (self._second if self._first.is_set() else self._first).set()

    @property
    def stopping(self) -> bool:
        return self._first.is_set()

    async def stop(self) -> None:
        """Returns at the first stop signal: leave, in order."""
        await self._first.wait()

    async def stop_now(self) -> None:
        """Returns at the second: leave at once."""
        await self._second.wait()


def run_process(main: Callable[[Signals], Awaitable[None]]) -> int:
    """Run a service to its end and give the exit code. StartupError becomes one line on standard error."""

    async def body() -> None:
        signals = Signals()
        signals.install()
        await main(signals)

    try:
        asyncio.run(body())
    except StartupError as error:
        print(f"splitserve: {error.message}", file=sys.stderr, flush=True)
        return row_of(error).exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def die_with_parent() -> None:
    """Be killed when the parent dies (Linux), or find out in `parent_watch` (elsewhere).

    Called first thing by a child of `serve`: a SIGKILLed supervisor leaves no process behind.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


async def parent_watch(parent: int, every_s: float = 1.0) -> None:
    """Kill this process once `parent` is not its parent any more; closes the race of `die_with_parent`, and serves macOS."""
    while os.getppid() == parent:  # noqa: ASYNC110  # the kernel tells nobody but init
        await asyncio.sleep(every_s)
    log.error("the supervisor is gone; leaving", extra={"parent": parent})
    os.kill(os.getpid(), signal.SIGKILL)
