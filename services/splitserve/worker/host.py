"""The engine's thread: commands in, one batch of events a step out to the event loop (protocol D11)."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from splitserve.engine import door
from splitserve.errors import EngineFailed
from splitserve.faultpoints import Faults
from splitserve.runtime.process import NativeThread
from splitserve.worker.lending import Lender

log = logging.getLogger("splitserve.worker")

_LOOK_S = 0.01  # between looks whether the thread has ended
_LAST = (door.Gone, door.Preempted, door.Rejected, door.Failed)


class EngineLike(Protocol):
    """What the thread calls; `engine.Engine` is it."""

    @property
    def has_work(self) -> bool: ...
    @property
    def load(self) -> tuple[int, int]: ...
    def submit(self, command: door.Command) -> None: ...
    def answer(self) -> door.Batch | None: ...
    def step(self, early: Callable[[door.Batch], None] | None = None) -> door.Batch | None: ...


class Host:
    """Runs an engine in a thread of its own.

    `on_batch` is called in the event loop, once a step. `on_event` is called in the thread, for each event before its
    batch goes out. An engine that raises ends the thread: every job it had gets `Failed`, and `crashed` tells why.
    """

    def __init__(
        self,
        engine: EngineLike,
        on_batch: Callable[[door.Batch], None],
        *,
        on_event: Callable[[door.Event], None] = lambda event: None,
        faults: Faults | None = None,
        lender: Lender | None = None,
    ) -> None:
        self.crashed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._engine = engine
        self._on_batch = on_batch
        self._on_event = on_event
        self._faults = faults or Faults()
        self._lender = lender
        self._loop = asyncio.get_running_loop()
        self._wake = threading.Condition()
        self._commands: deque[door.Command] = deque()
        self._stopping = False
        self._why = ""  # it crashed
        self._step_began: float | None = None
        self._live: set[door.Key] = set()
        self._pool = door.PoolStats(0, 0, 0, 0, 0)
        self._thread = NativeThread(self._run, "engine")

    def start(self) -> None:
        self._thread.start()

    def submit(self, command: door.Command) -> None:
        """From the loop: carried out between two steps; after a crash a job fails at once."""
        with self._wake:
            self._commands.append(command)
            self._wake.notify()
            if self._why:
                self._fail_all()

    @property
    def step_age_ms(self) -> int:
        """How long the step under way has been running; 0 between steps. A wedged engine is seen by it."""
        began = self._step_began
        return 0 if began is None else int((time.monotonic() - began) * 1000)

    @property
    def load(self) -> tuple[int, int]:
        """How many are being computed and how many wait, those included that the engine has not taken in yet."""
        running, waiting = self._engine.load
        coming = (c for c in tuple(self._commands) if isinstance(c, door.Add) and c.mode is not door.Mode.AWAIT)
        return running, waiting + sum(add.counted for add in coming)

    async def stop(self, within_s: float = 5.0, hurried: Callable[[], bool] = lambda: False) -> bool:
        """End the thread behind the step under way; False when that does not end in time, or before `hurried()`."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        end = self._loop.time() + within_s
        while self._thread.is_alive() and self._loop.time() < end and not hurried():  # noqa: ASYNC110  # no event tells it
            await asyncio.sleep(_LOOK_S)
        if self._thread.is_alive():
            log.error("engine thread stuck", extra={"step_age_ms": self.step_age_ms})
        return not self._thread.is_alive()

    # --- the thread ---

    def _run(self) -> None:
        try:
            while self._next_commands():
                self._report(self._engine.answer())
                if self._engine.has_work:
                    self._report(self._step())
        except Exception as error:  # whatever it is: the loop must hear of it
            log.exception("engine crashed", extra={"jobs": len(self._live)})
            self._crash(f"{type(error).__name__}: {error}")

    def _next_commands(self) -> bool:
        """Wait until there is something to do; False when there is nothing more to do ever."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or self._commands or self._engine.has_work)
            commands, self._commands = self._commands, deque()
        for command in commands:
            if isinstance(command, door.Add):
                self._live.add(command.key)
            self._engine.submit(command)
        return not self._stopping

    def _step(self) -> door.Batch | None:
        self._step_began = time.monotonic()
        try:
            if self._lender:
                self._lender.before_step()
            if slow := self._faults.value("engine.step_slow"):
                time.sleep(slow)
            if self._faults.fires("engine.step_raise"):
                raise EngineFailed("told to raise (engine.step_raise)")
            return self._engine.step(self._report)
        finally:
            self._step_began = None
            if self._lender:
                self._lender.after_step()

    def _report(self, batch: door.Batch | None) -> None:
        if batch is None:
            return
        self._pool = batch.pool
        for event in batch.events:
            self._on_event(event)
            if isinstance(event, _LAST):
                self._live.discard(event.key)
        self._loop.call_soon_threadsafe(self._on_batch, batch)

    def _crash(self, why: str) -> None:
        with self._wake:
            self._why = why
            self._fail_all()
        self._loop.call_soon_threadsafe(self.crashed.set_result, why)

    def _fail_all(self) -> None:
        """Jobs in the engine, and those on their way to it."""
        self._live.update(command.key for command in self._commands if isinstance(command, door.Add))
        self._commands.clear()
        failed = tuple(door.Failed(key, self._why) for key in self._live)
        self._live.clear()
        if failed:
            self._loop.call_soon_threadsafe(self._on_batch, door.Batch(failed, None, self._pool, 0))
