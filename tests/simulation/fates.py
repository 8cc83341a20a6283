"""What befalls processes and the bus: death, sleep, silence. One function a fate, one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from simulation.plan import Event, Fate
from simulation.process import Process
from simulation.router import LIVE, RouterProcess
from simulation.worker import Worker
from splitserve.protocol.effects import Drain

if TYPE_CHECKING:
    from simulation.world import World

STUCK_S = 30.0  # the supervisor's patience with one step
DRAIN_S = 5.0
POISON_RESTART_S = 0.2


def befall(world: World, event: Event) -> None:
    """Let an event of the schedule happen, if there is somebody for it to happen to."""
    process = world.processes.get(event.target)
    if event.fate is Fate.BUS_RESTART:
        _bus_restart(world, event)
    elif process is not None and process.alive and event.fate in FATES:
        _count(world, event, process)
        FATES[event.fate](world, event, process)


def _count(world: World, event: Event, process: Process) -> None:
    """Which row of the failure table this is: what the requests there were in."""
    role = process.role if isinstance(process, Worker) else "router"
    router = world.router
    states = {
        str(record.state)
        for record in router.states.values()
        if record.state in LIVE and (role == "router" or event.target in (record.prefill, record.decode))
    }
    for state in sorted(states) or ["idle"]:
        world.journal.count(f"failure: {event.fate}", f"{role} | {state}")
    world.journal.write(world.clock.now, event.target, f"!{event.fate}", f"{event.seconds:.2f} s")


def _kill(world: World, event: Event, process: Process) -> None:
    process.die()
    if isinstance(process, RouterProcess):
        for client in process.clients.values():
            client.gone = client.gone or client.done is None
    world.clock.after(event.seconds, world.start, event.target)


def poisoned(world: World, process: Worker) -> None:
    """A request killed the worker that took it; the supervisor is quick."""
    if process.alive:
        _kill(world, Event(world.clock.now, Fate.KILL, process.name, POISON_RESTART_S), process)


def _freeze(world: World, event: Event, process: Process) -> None:
    if not process.frozen:
        process.freeze()
        world.frozen_s += event.seconds if isinstance(process, RouterProcess) else 0.0
        world.clock.after(event.seconds, process.thaw)


def _partition(world: World, event: Event, process: Process) -> None:
    """Dead lines that nobody knows of. After some seconds both ends give up."""
    if not process.connection.up or process.connection.held is not None:
        return
    main_only = world.rng.random() < 0.3
    lines = (process.connection,) if main_only else (process.connection, process.beats)
    for line in lines:
        world.bus.hush(line)
    noticed = world.rng.uniform(4.0, 6.0)

    def heal() -> None:
        for line in lines:
            if line.up and process.alive:
                world.bus.mend(line)

    if event.seconds < noticed:
        world.clock.after(event.seconds, heal)
    else:
        world.clock.after(noticed, process.bus_down)
        world.clock.after(event.seconds, process.bus_up)


def _cut(world: World, event: Event, process: Process) -> None:
    if process.connection.up:
        process.bus_down()
        world.clock.after(event.seconds, process.bus_up)


def _bus_restart(world: World, event: Event) -> None:
    """The server goes, all lose it at once, each comes back in its own time."""
    world.journal.count("failure: bus restart", "<= 15 s" if event.seconds <= 15 else "> 15 s")
    world.journal.write(world.clock.now, "bus", "!restart", f"{event.seconds:.2f} s")
    world.bus_up_at = max(world.bus_up_at, world.clock.now + event.seconds)
    for process in tuple(world.processes.values()):
        if process.alive and process.connection.up:
            process.bus_down()
            world.clock.after(event.seconds + world.rng.uniform(0.0, 0.4), process.bus_up)


def _wedge(world: World, event: Event, process: Process) -> None:
    """A step of the next second hangs; the supervisor ends a worker whose step is stuck for too long."""
    if isinstance(process, Worker):
        process.wedged_s = event.seconds
        world.clock.after(1.0, _spare, process)
        if event.seconds > STUCK_S:
            world.clock.after(STUCK_S + 1.0, _end_stuck, world, event, process)


def _spare(process: Worker) -> None:
    process.wedged_s = 0.0


def _end_stuck(world: World, event: Event, process: Worker) -> None:
    if process.alive and process.step_age_s > STUCK_S:
        _kill(world, event, process)


def _raise(world: World, event: Event, process: Process) -> None:
    if isinstance(process, Worker):
        process.runner.failures = world.rng.choice((1, 2))


def _leave(world: World, event: Event, process: Process) -> None:
    if isinstance(process, Worker):
        process.soon(process.handle, Drain())
        world.clock.after(0.5, _leave_when_idle, world, event, process, world.clock.now + DRAIN_S)


def _leave_when_idle(world: World, event: Event, process: Worker, latest: float) -> None:
    if not process.alive:
        return
    if process.idle or world.clock.now >= latest:
        _kill(world, event, process)
    else:
        world.clock.after(0.5, _leave_when_idle, world, event, process, latest)


FATES: dict[Fate, Callable[[World, Event, Process], None]] = {
    Fate.KILL: _kill,
    Fate.FREEZE: _freeze,
    Fate.PARTITION: _partition,
    Fate.CUT: _cut,
    Fate.WEDGE: _wedge,
    Fate.RAISE: _raise,
    Fate.LEAVE: _leave,
}
