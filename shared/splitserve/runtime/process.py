"""A process's life: start, signals, exit code. A start-up failure is one line and a code, never a traceback."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable

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

    code = 0
    try:
        asyncio.run(body())
    except StartupError as error:
        print(f"splitserve: {error.message}", file=sys.stderr, flush=True)
        code = row_of(error).exit_code
    except KeyboardInterrupt:
        code = 130
    if any(isinstance(thread, NativeThread) for thread in threading.enumerate()):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
