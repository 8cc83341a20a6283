"""One child process: started so that it cannot outlive us, its lines passed on, its last words kept."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from splitserve.tether import tethered

_LINE_LIMIT = 1 << 20
_OURS = "splitserve: "  # what `cli` prints before it leaves with an exit code


@dataclass(frozen=True, slots=True)
class Spec:
    """What to start. `env` is added to ours; `cpus` empty: run anywhere."""

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    cpus: tuple[int, ...] = ()


class Child:
    """A running process in a session of its own: Ctrl-C in the terminal reaches only the supervisor."""

    def __init__(self, process: asyncio.subprocess.Process, echo: Callable[[str], None]) -> None:
        self._process = process
        self._tail: deque[str] = deque(maxlen=20)
        self._pump = asyncio.create_task(self._pass_on(echo), name=f"lines-{process.pid}")

    @classmethod
    async def start(cls, spec: Spec, echo: Callable[[str], None]) -> Child:
        """Start `spec`; each line that it prints goes to `echo`."""
        process = await asyncio.create_subprocess_exec(
            *tethered(spec.command, spec.cpus),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **spec.env},
            start_new_session=True,
            limit=_LINE_LIMIT,
        )
        return cls(process, echo)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def wait(self) -> int:
        """The exit code (negative: a signal), once everything it printed was passed on."""
        code = await self._process.wait()
        _, unread = await asyncio.wait([self._pump], timeout=1.0)
        if unread:  # a grandchild holds the pipe open
            self._pump.cancel()
        return code

    def last_words(self) -> str:
        """Its own line about its end, else the last line it printed."""
        ours = [line for line in self._tail if line.startswith(_OURS)]
        return (ours or [line for line in self._tail if line.strip()] or [""])[-1].removeprefix(_OURS)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.running:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    async def _pass_on(self, echo: Callable[[str], None]) -> None:
        stream = self._process.stdout
        while stream is not None:
            try:
                line = await stream.readline()
            except ValueError:  # longer than the limit: that piece is lost
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip("\n")
            self._tail.append(text)
            echo(text)


def python(*arguments: str) -> tuple[str, ...]:
    """A command of this very Python."""
    return (sys.executable, *arguments)
