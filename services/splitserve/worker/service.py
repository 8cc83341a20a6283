"""The life of a worker process: start in order, serve, drain, stop in reverse. A role adds its core and its data plane."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from splitserve.bus.bus import Bus
from splitserve.config import WorkerProcessSettings
from splitserve.engine import door
from splitserve.errors import EngineFailed
from splitserve.faultpoints import Faults
from splitserve.protocol.effects import BusDown, BusUp
from splitserve.protocol.messages import Beat
from splitserve.protocol.states import Role
from splitserve.protocol.subjects import Subjects
from splitserve.runtime.addresses import address_of
from splitserve.runtime.heartbeat import Heartbeat
from splitserve.runtime.http import bind, health_app, port_of, serving
from splitserve.runtime.identity import found_at, name_of, url_of
from splitserve.runtime.lag import watch_lag
from splitserve.runtime.logs import set_up_logs
from splitserve.runtime.process import NativeThread, Signals
from splitserve.runtime.shell import Shell, ShellCore, Watch
from splitserve.telemetry.metrics import Metrics
from splitserve.telemetry.tracing import Tracer, open_tracer
from splitserve.worker.drain import drain
from splitserve.worker.effects import EngineBatch, ToEngine
from splitserve.worker.engine_cores import EngineCores
from splitserve.worker.estimates import Estimator
from splitserve.worker.host import Host
from splitserve.worker.lending import Lender, Lending
from splitserve.worker.machine import Machine, build_machine
from splitserve.worker.observe import Loaded, StepMetrics, WorkerMetrics

log = logging.getLogger("splitserve.worker")

_CRASH_GRACE_S = 1.0  # for the rows that say so
_STEP_S = 5.0  # for the step under way, at least: when the time to drain is spent
_GIL_S = 0.0002  # event loop and engine thread hand each other work, and neither is to wait for Python's 5 ms


class Core(ShellCore, Loaded, Protocol):
    """What the service asks of either core."""

    @property
    def draining(self) -> bool: ...
    def beat(self, now: float, step_age_ms: int = 0, bus_lag_ms: int = 0) -> Beat: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What a role may build upon. `put` brings the core an event; it may be called once the role is made."""

    settings: WorkerProcessSettings
    machine: Machine
    subjects: Subjects
    metrics: Metrics
    faults: Faults
    tracer: Tracer
    put: Callable[[object], None]
    stack: AsyncExitStack  # what the role opened is closed here


@dataclass(frozen=True, slots=True)
class RoleParts:
    """What a role adds."""

    core: Core
    subjects: tuple[str, ...]
    acts: Mapping[type, Callable[[Any], None]]
    on_event: Callable[[door.Event], None] = lambda event: None  # in the engine's thread
    refresh: Callable[[], None] = lambda: None  # gauges, when the page is asked for
    on_beat: Callable[[], None] = lambda: None
    watch: Watch | None = None


MakeRole = Callable[[Parts], Awaitable[RoleParts]]


async def run_worker(settings: WorkerProcessSettings, signals: Signals, role: Role, make: MakeRole) -> None:
    """Serve until a stop signal. Raises StartupError at start, EngineFailed when the engine's thread crashed."""
    name = name_of(settings.worker.name, role)
    sys.setswitchinterval(_GIL_S)
    set_up_logs(settings.log, name)
    tracer = open_tracer(settings.tracing, f"splitserve-{role}", name, settings.cluster.cluster)
    url = address_of(settings.cluster.nats, "--nats")
    sock = bind(settings.worker.metrics_host, settings.worker.metrics_port)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(tracer.close)
        stack.callback(sock.close)
        metrics_url = url_of(found_at(settings.worker.metrics_host, settings.worker, url), port_of(sock), "/metrics")
        events = Mailbox()
        bus = await _connect(stack, settings, url, name, role, events.put)
        beats = await _connect(stack, settings, url, f"{name}-beats", role, lambda event: None)
        machine = await _unless_stopped(signals, lambda: build_machine(settings, role, name, metrics_url))
        if machine is None:
            return
        stack.callback(machine.close)
        gc.freeze()  # the model stays: looking through it for garbage would hold a step up
        await _serve(settings, signals, role, make, machine, tracer, stack, bus, beats, sock, events)


class Mailbox:
    """Events of a core that is not there yet: kept, then passed on."""

    def __init__(self) -> None:
        self._kept: list[object] = []
        self._to: Callable[[object], None] = self._kept.append

    def put(self, event: object) -> None:
        self._to(event)

    def deliver(self, to: Callable[[object], None]) -> None:
        self._to = to
        for event in self._kept:
            to(event)


async def _connect(
    stack: AsyncExitStack,
    settings: WorkerProcessSettings,
    url: str,
    name: str,
    role: Role,
    put: Callable[[object], None],
) -> Bus:
    bus = await Bus.connect(
        url,
        name=name,
        role=role,
        connect_timeout_s=settings.cluster.connect_timeout,
        on_down=lambda: put(BusDown()),
        on_up=lambda: put(BusUp()),
    )
    stack.push_async_callback(bus.close)
    return bus


async def _unless_stopped(signals: Signals, build: Callable[[], Machine]) -> Machine | None:
    """`build()` in a thread; None when a stop signal came first (the thread is a daemon and does not keep us)."""
    loop = asyncio.get_running_loop()
    built: asyncio.Future[Machine] = loop.create_future()

    def tell(done: Callable[[Any], None], value: object) -> None:
        if not built.done():
            done(value)

    def work() -> None:
        try:
            done, value = built.set_result, build()
        except Exception as error:  # noqa: BLE001  # it belongs to the one who waits
            done, value = built.set_exception, error
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, done, value)

    NativeThread(work, "build").start()
    stop = asyncio.ensure_future(signals.stop())
    await asyncio.wait({built, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    return await built if built.done() else None


async def _serve(
    settings: WorkerProcessSettings,
    signals: Signals,
    role: Role,
    make: MakeRole,
    machine: Machine,
    tracer: Tracer,
    stack: AsyncExitStack,
    bus: Bus,
    beats: Bus,
    sock: socket.socket,
    events: Mailbox,
) -> None:
    identity, subjects = machine.identity, Subjects(settings.cluster.cluster)
    faults = Faults.from_environment(os.environ)
    metrics = Metrics(
        role,
        model_name=identity.model,
        engine=identity.name,
        max_model_len=identity.max_model_len,
        legacy=settings.worker.legacy_metrics,
    )
    parts = await make(Parts(settings, machine, subjects, metrics, faults, tracer, events.put, stack))
    core = parts.core
    steps = StepMetrics(metrics, Estimator(machine.sizes))
    observed = WorkerMetrics(metrics, core, lambda: host.load, (bus, beats), lambda: host.step_age_ms, parts.refresh)
    metrics.gauge("vllm:cache_config_info", **machine.cache_config).set(1)

    def on_batch(batch: door.Batch) -> None:
        steps.on_batch(batch)
        for event in batch.events:
            if isinstance(event, door.Failed | door.Rejected):
                log.error("job lost in the engine", extra={"key": str(event.key), "why": event.message})
        events.put(EngineBatch(batch))

    lending = Lending.parse(settings.worker.lending) if settings.worker.lending else None
    lender = Lender(lending, EngineCores(lending.own).use) if lending else None
    host = Host(machine.engine, on_batch, on_event=parts.on_event, faults=faults, lender=lender)
    shell = Shell(core, bus, {ToEngine: lambda c: host.submit(c.command), **parts.acts}, faults, parts.watch)
    events.deliver(shell.put)

    def make_beat(lag_ms: int) -> Beat:
        parts.on_beat()
        beat = core.beat(asyncio.get_running_loop().time(), host.step_age_ms, lag_ms)
        return replace(beat, ready=not faults.value("worker.never_ready"))

    round_trip = metrics.histogram("splitserve_bus_round_trip_seconds").observe
    heartbeat = Heartbeat(beats, subjects, make_beat, shell.receive, observed.page, round_trip=round_trip)
    host.start()
    left_s = 0.0  # for the step under way, of the time to drain

    async def stop_host() -> None:
        await host.stop(max(_STEP_S, left_s), lambda: signals.hurried)

    stack.push_async_callback(stop_host)
    lag = metrics.histogram("splitserve_event_loop_lag_seconds").observe
    tasks = [
        asyncio.create_task(shell.run(), name="shell"),
        asyncio.create_task(watch_lag(lag), name="loop-lag"),
    ]
    stack.push_async_callback(_cancel, tasks)
    for subject in parts.subjects:
        await bus.subscribe(subject, shell.receive)
    await bus.receive_replies(shell.receive)
    await bus.flush(settings.cluster.connect_timeout)  # nobody may hear our beat before we can be asked
    app = health_app(observed.answer, lambda: "draining" if core.draining else "")
    await stack.enter_async_context(serving(app, sock))
    tasks.append(asyncio.create_task(heartbeat.run(), name="heartbeat"))
    log.info("ready", extra={"model": identity.model, "blocks": identity.total_blocks, "metrics": identity.metrics_url})
    await _until_told(signals, host, tasks)
    crashed = host.crashed.done()
    left_s = await drain(shell, signals, _CRASH_GRACE_S if crashed else settings.worker.drain_timeout)
    if crashed:
        raise EngineFailed(f"the engine crashed: {host.crashed.result()}")


async def _until_told(signals: Signals, host: Host, tasks: list[asyncio.Task[None]]) -> None:
    """Returns at a stop signal or an engine's crash; raises what ended one of our own tasks."""
    stop = asyncio.ensure_future(signals.stop())
    await asyncio.wait({stop, host.crashed, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    for task in tasks:
        if task.done():
            task.result()


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
