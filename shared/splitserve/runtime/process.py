"""A process's life: start, signals, exit code. A start-up failure is one line and a code, never a traceback."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress

from splitserve.errors import StartupError, row_of

log = logging.getLogger("splitserve.runtime")


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

    @property
    def hurried(self) -> bool:
        return self._second.is_set()

    async def stop(self) -> None:
        """Returns at the first stop signal: leave, in order."""
        await self._first.wait()

    async def stop_now(self) -> None:
        """Returns at the second: leave at once."""
        await self._second.wait()


class NativeThread(threading.Thread):
    """A daemon that may be deep in native code when its process ends: were the interpreter torn down around it, it would
    abort."""

    def __init__(self, target: Callable[[], None], name: str) -> None:
        super().__init__(target=target, name=name, daemon=True)


def run_process(main: Callable[[Signals], Awaitable[None]]) -> int:
    """Run a service to its end and give the exit code. StartupError becomes one line on standard error."""

    async def body() -> None:
        signals = Signals()
        signals.install()
        await main(signals)

    try:
        code = _code_of(body)
    except BaseException:
        if not _native_threads():
            raise
        traceback.print_exc()
        code = 1
    if _native_threads():
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


def _code_of(body: Callable[[], Coroutine[None, None, None]]) -> int:
    try:
        asyncio.run(body())
    except StartupError as error:
        print(f"splitserve: {error.message}", file=sys.stderr, flush=True)
        return row_of(error).exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _native_threads() -> bool:
    return any(isinstance(thread, NativeThread) for thread in threading.enumerate())
