"""Children kept alive: started, asked whether they are ready, restarted or given up as their policy says, stopped in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from splitserve.errors import StartupError
from splitserve.protocol.messages import Beat
from splitserve.serve.child import Child, Spec
from splitserve.serve.policy import ChildPolicy, Command, GiveUp, Kill, Phase, Rules, Start

log = logging.getLogger("splitserve.serve")

TICK_S = 0.1
PROBE_EVERY_S = 0.1
LAST_GRACE_S = 2.0  # for those that come after a drain that took its whole time

Probe = Callable[[], Awaitable[bool]]
Echo = Callable[[str], None]


@dataclass(slots=True)
class Entry:
    """A child over all its lives. `probe` None: its beats say when it is ready."""

    spec: Spec
    policy: ChildPolicy
    probe: Probe | None
    echo: Echo
    child: Child | None = None
    exit: asyncio.Task[int] | None = None
    probing: asyncio.Task[None] | None = None


class Supervisor:
    """Owns every child process of `splitserve serve`. `on_ready(name)` is called at each start that succeeds."""

    def __init__(self, rules: Rules, on_ready: Callable[[str], None]) -> None:
        self._rules = rules
        self._on_ready = on_ready
        self._entries: dict[str, Entry] = {}
        self._changed = asyncio.Event()

    def add(self, spec: Spec, echo: Echo, probe: Probe | None = None) -> None:
        """Look after one more child from the next tick on."""
        self._entries[spec.name] = Entry(spec, ChildPolicy(spec.name, self._rules), probe, echo)

    def pids(self) -> dict[str, int]:
        """Process ids of the children that run now."""
        return {name: entry.child.pid for name, entry in self._entries.items() if entry.child and entry.child.running}

    def heard(self, beat: Beat) -> None:
        """A beat of anybody; those of our children count."""
        entry = self._entries.get(beat.name)
        if entry is None or entry.child is None or not entry.child.running:
            return
        if beat.ready and entry.probe is None:
            self._ready(entry)
        self._kill_if_told(entry, entry.policy.step_age(beat.step_age_ms / 1000))

    async def ready(self, names: Sequence[str]) -> None:
        """Wait until all of `names` are ready at the same time. How long that may take is the rules' matter."""
        while not all(self._entries[name].policy.phase is Phase.READY for name in names):
            self._changed.clear()
            await self._changed.wait()

    async def keep(self) -> None:
        """Start, watch and restart until cancelled. Raises the StartupError with which a child is given up."""
        while True:
            for entry in list(self._entries.values()):
                await self._look_at(entry, asyncio.get_running_loop().time())
            await asyncio.sleep(TICK_S)

    async def stop(self, order: Sequence[Sequence[str]], drain_s: float, at_once: asyncio.Event) -> None:
        """Terminate group after group and wait; kill what is left after `drain_s`, or when `at_once` is set."""
        loop = asyncio.get_running_loop()
        end = loop.time() + drain_s
        for names in order:
            children = [entry.child for name in names if (entry := self._entries.get(name)) and entry.child]
            if not at_once.is_set():
                for child in children:
                    child.terminate()
                await self._gone(children, max(LAST_GRACE_S, end - loop.time()), at_once)
            for child in children:
                child.kill()
        await self.kill_all()

    async def kill_all(self) -> None:
        """Leave no child behind."""
        for entry in self._entries.values():
            if entry.probing:
                entry.probing.cancel()
            if entry.child:
                entry.child.kill()
        await asyncio.gather(*(entry.exit for entry in self._entries.values() if entry.exit))

    async def _look_at(self, entry: Entry, now: float) -> None:
        if entry.exit and entry.exit.done() and entry.child:
            code, words = entry.exit.result(), entry.child.last_words()
            entry.child = entry.exit = None
            log.warning("child ended", extra={"child": entry.spec.name, "exit_code": code, "said": words})
            self._raise_if_told(entry.policy.exited(now, code, words))
        commands = entry.policy.tick(now)
        self._raise_if_told(commands)
        self._kill_if_told(entry, commands)
        if Start() in commands:
            entry.child = await Child.start(entry.spec, entry.echo)
            entry.exit = asyncio.create_task(entry.child.wait(), name=f"exit-{entry.spec.name}")
            entry.policy.started(now)
            if entry.probe:
                entry.probing = asyncio.create_task(self._probe(entry, entry.probe), name=f"probe-{entry.spec.name}")

    async def _probe(self, entry: Entry, probe: Probe) -> None:
        while entry.policy.phase is Phase.STARTING:
            if await probe() and entry.child and entry.child.running:
                self._ready(entry)
            await asyncio.sleep(PROBE_EVERY_S)

    def _ready(self, entry: Entry) -> None:
        if entry.policy.ready(asyncio.get_running_loop().time()):
            self._on_ready(entry.spec.name)
            self._changed.set()

    def _kill_if_told(self, entry: Entry, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Kill) and entry.child:
                log.error("child killed", extra={"child": entry.spec.name, "reason": command.reason})
                entry.child.kill()

    def _raise_if_told(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, GiveUp):
                raise command.error

    async def _gone(self, children: Sequence[Child], seconds: float, at_once: asyncio.Event) -> None:
        waits = [asyncio.create_task(child.wait()) for child in children]
        hurry = asyncio.create_task(at_once.wait())
        try:
            everybody = asyncio.gather(*waits, return_exceptions=True)  # one that is cancelled below is no error
            await asyncio.wait([everybody, hurry], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            hurry.cancel()
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, hurry, return_exceptions=True)


async def run_once(spec: Spec, echo: Echo) -> None:
    """Run a child to its end, and kill it when cancelled. Raises the StartupError that its exit code stands for."""
    child = await Child.start(spec, echo)
    try:
        code = await child.wait()
    except asyncio.CancelledError:
        child.kill()
        await child.wait()
        raise
    if code:
        raise failure_of(spec.name, code, child.last_words())


def failure_of(name: str, code: int, words: str) -> StartupError:
    """The error of a child that ended with `code` before it was of use."""
    told = ChildPolicy(name, Rules(failed_starts=1)).exited(0.0, code, words)
    return next(command.error for command in told if isinstance(command, GiveUp))
