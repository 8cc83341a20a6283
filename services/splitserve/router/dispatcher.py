"""Carries out what the router's core decides: the bus, the clients' queues, the store. Decides nothing.

A client's queue holds ids only, four bytes a token: however slowly it reads, decode is not held back (protocol D12).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress

from splitserve.bus.bus import Bus
from splitserve.errors import RequestFailed, SplitserveError
from splitserve.protocol.effects import BusDown, BusUp
from splitserve.protocol.messages import Beat
from splitserve.protocol.states import RequestState, Role, is_probe
from splitserve.protocol.subjects import Subjects
from splitserve.protocol.trace import NO_TRACE
from splitserve.router.account import Life
from splitserve.router.core import RouterCore
from splitserve.router.effects import Crashed, Deliver, Leave, Save, Stop, Submit
from splitserve.router.generation import Done, Hear, Submission, Tokens
from splitserve.router.records import Record
from splitserve.router.spans import GenerationSpans
from splitserve.runtime.heartbeat import Heartbeat
from splitserve.runtime.shell import Shell
from splitserve.telemetry.tracing import NullTracer, Tracer

log = logging.getLogger("splitserve.router")

CLOSE_S = 2.0


class Dispatcher:
    """`generation.Generator` over one core. `save` is told the latest record of a request."""

    def __init__(self, core: RouterCore, bus: Bus, beats: Bus, save: Callable[[Record], None], tracer: Tracer) -> None:
        self.bus = bus
        self.beats = beats
        self._core = core
        self._save_record = save
        self.delivered: Callable[[int], None] = lambda tokens: None  # told of the tokens that go to a client
        self._spans = GenerationSpans(tracer)
        self._loop = asyncio.get_running_loop()
        self._running: dict[str, RunningGeneration] = {}
        self._records: dict[str, Record] = {}  # of live requests
        self._delivered = 0  # tokens, of the event under way
        acts = {Deliver: self._deliver, Save: self._save, Crashed: self._crashed}
        self._shell = Shell(core, bus, acts, watch=self._handled)
        self._stack = AsyncExitStack()

    @classmethod
    async def open(
        cls,
        core: RouterCore,
        *,
        nats: str,
        subjects: Subjects,
        life: str,
        connect_timeout_s: float,
        save: Callable[[Record], None],
        page: Callable[[], bytes],
        round_trip: Callable[[float], None] = lambda seconds: None,
        tracer: Tracer | None = None,
    ) -> Dispatcher:
        """Connect, subscribe, beat. Raises NeverReady, ConfigError. `page`: the metrics page for other routers."""
        async with AsyncExitStack() as stack:
            bus = await Bus.connect(nats, name=core.name, role=Role.ROUTER, connect_timeout_s=connect_timeout_s)
            stack.push_async_callback(bus.close)
            beats = await Bus.connect(
                nats, name=f"{core.name}-beats", role=Role.ROUTER, connect_timeout_s=connect_timeout_s
            )
            stack.push_async_callback(beats.close)
            self = cls(core, bus, beats, save, tracer or NullTracer())
            self._watch(bus)
            await bus.subscribe(subjects.router_events(life), self._shell.receive)
            await bus.receive_replies(self._shell.receive)
            heartbeat = Heartbeat(beats, subjects, self._beat, self._shell.receive, page, round_trip=round_trip)
            for work in (self._shell.run(), heartbeat.run()):
                task = asyncio.create_task(work, name="dispatcher")
                stack.push_async_callback(ended, task)
            self._stack = stack.pop_all()
            return self

    async def close(self) -> None:
        """End what still runs, with an error for its client and a Cancel for its workers, and disconnect."""
        for generation in list(self._running.values()):
            error = RequestFailed("the router is stopping")
            generation.hear(Done(error))
            self.leave(generation.rid, error)
        with suppress(TimeoutError):  # then the workers notice our silence
            await self._shell.settled(CLOSE_S)
        await self._stack.aclose()

    # --- generation.Generator ---

    def submit(self, submission: Submission, hear: Hear) -> RunningGeneration:
        """Admit a request; it starts with `async with`. Raises Overloaded, BusUnavailable, NoWorkers."""
        refusal = self._core.refusal(submission, self._loop.time())
        if refusal is not None:
            raise refusal
        return RunningGeneration(self, submission, hear)

    def start(self, generation: RunningGeneration) -> None:
        self._running[generation.rid] = generation
        submission = self._spans.begin(generation.submission, self._loop.time())
        generation.trace = submission.trace
        self._shell.put(Submit(submission))

    def stop(self, rid: str, choice: int) -> None:
        self._shell.put(Stop(rid, choice))

    def leave(self, rid: str, error: SplitserveError | None = None) -> None:
        """Nobody waits for it, see `Leave`; a request that has ended already is none the worse."""
        if self._running.pop(rid, None) is not None:
            self._shell.put(Leave(rid, error))

    # --- views ---

    def record(self, rid: str) -> Record | None:
        """The latest record of a live request."""
        return self._records.get(rid)

    def live_requests(self) -> dict[str, RequestState]:
        """Their states, by id."""
        return self._core.live

    def counts(self) -> dict[str, int]:
        """What happened since the start, of requests that count."""
        return self._core.counts

    def oldest_age_s(self) -> float:
        """Age of the oldest live request; 0 when there is none."""
        return self._core.oldest_age(self._loop.time())

    def lives(self) -> list[Life]:
        """Every other process that beats."""
        return self._core.fleet.lives(self._loop.time())

    def live_roles(self) -> list[Role]:
        """The role of each worker that may be given work."""
        return [Role(worker.beat.role) for worker in self._core.fleet if worker.alive]

    # --- the bus ---

    def _watch(self, bus: Bus) -> None:
        bus.on_down = lambda: self._shell.put(BusDown())
        bus.on_up = lambda: self._shell.put(BusUp())
        if not bus.connected:
            self._shell.put(BusDown())

    def _beat(self, _bus_lag_ms: int) -> Beat:
        return self._core.beat(self._loop.time())

    # --- commands ---

    def _deliver(self, command: Deliver) -> None:
        rid, event, cached_tokens = command
        generation = self._running.get(rid)
        if generation is None:
            return
        generation.cached_tokens = cached_tokens
        if isinstance(event, Tokens):
            if generation.counts:
                self._delivered += len(event.ids)
        elif isinstance(event, Done):
            del self._running[rid]
        generation.hear(event)

    def _handled(self, _event: object, _commands: object, _now: float) -> None:
        if self._delivered:
            tokens, self._delivered = self._delivered, 0
            self.delivered(tokens)

    def _save(self, command: Save) -> None:
        record = command.record
        self._spans.saved(record, self._loop.time())
        if record.state.terminal:
            self._records.pop(record.rid, None)
        else:
            self._records[record.rid] = record
        self._save_record(record)

    def _crashed(self, command: Crashed) -> None:
        running = self._running.get(command.rid)
        trace = running.trace if running is not None else NO_TRACE
        log.error("the core raised", exc_info=command.error, extra={"rid": command.rid, **trace.told()})


class RunningGeneration:
    """One request as its endpoint has it (`generation.Generation`)."""

    __slots__ = ("_dispatcher", "cached_tokens", "counts", "hear", "rid", "submission", "trace")

    def __init__(self, dispatcher: Dispatcher, submission: Submission, hear: Hear) -> None:
        self.submission = submission
        self.rid = submission.rid
        self.counts = not is_probe(submission.rid)
        self.trace = submission.trace
        self.hear = hear
        self.cached_tokens = 0
        self._dispatcher = dispatcher

    def stop(self, choice: int) -> None:
        self._dispatcher.stop(self.rid, choice)

    async def __aenter__(self) -> RunningGeneration:
        self._dispatcher.start(self)
        return self

    async def __aexit__(self, *exc: object) -> None:
        error = exc[1]
        self._dispatcher.leave(self.rid, error if isinstance(error, SplitserveError) else None)


async def ended(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end; what it raised is logged."""
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return
    except SplitserveError:
        log.exception("a task of the dispatcher failed", extra={"task": task.get_name()})
