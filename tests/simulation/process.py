"""A process: a core, its timer, its connections, its open questions. It can freeze, wake, lose its bus, and die."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from simulation.bus import Connection
from simulation.invariants import Violation
from splitserve.protocol.effects import (
    Answer,
    Answered,
    Ask,
    BusDown,
    BusUp,
    Core,
    NoAnswer,
    Publish,
    Received,
    Tick,
    Unanswered,
)
from splitserve.protocol.messages import Message

if TYPE_CHECKING:
    from simulation.world import World

SERVER_PATIENCE_S = 11.0  # a client that answers no ping for so long is cut off (ping_interval 5 s, ping_max 2)
TIMER_SLACK_S = 1e-6  # no timer fires early, rounding included
IDLE_TICKS = 5  # ticks in a row that move no timer: the core spins


class Process:
    """One life of a process. `acts` says how each command of its core is carried out; roles add core and commands."""

    core: Core[Any, Any]

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.frozen = False
        self.freezes = 0
        self.connection = Connection(name)
        self.beats = Connection(f"{name}/beats")
        self.clock_offset = world.rng.uniform(0, 1000)  # no two processes share a clock
        self.acts: dict[type, Callable[[Any], None]] = {Publish: self._publish, Ask: self._ask, Answer: self._answer}
        self._messages: list[tuple[Callable[..., None], tuple[Any, ...]]] = []  # what came while frozen
        self._timers: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._asked: dict[int, Any] = {}
        self._questions = 0
        self._armed = float("inf")
        self._idle_ticks = 0

    @property
    def now(self) -> float:
        """This process's own monotonic clock."""
        return self.world.clock.now + self.clock_offset

    # --- events in ---

    def subscribe(self, *subjects: str) -> None:
        for subject in subjects:
            self.world.bus.subscribe(self.connection, subject, self.message)

    def subscribe_beats(self, subject: str) -> None:
        self.world.bus.subscribe(self.beats, subject, self.beat)

    def beat(self, beat: Message, _reply_to: str | None) -> None:
        """Somebody's beat, our own too."""
        self.message(beat, None)

    def message(self, message: Message, reply_to: str | None) -> None:
        if self.frozen:
            self._messages.append((self.handle, (Received(message, reply_to),)))
        else:
            self.handle(Received(message, reply_to))

    def soon(self, call: Callable[..., None], *args: Any) -> None:
        """Something outside the bus reports (a timer, an engine, a transfer): late if we are frozen, never if dead."""
        if self.frozen:
            self._timers.append((call, args))
        elif self.alive:
            call(*args)

    def later(self, delay: float, call: Callable[..., None], *args: Any) -> None:
        self.world.clock.after(delay, self.soon, call, *args)

    def handle(self, event: Any) -> None:
        """Let the core decide, and do what it says."""
        if not self.alive:
            return
        world = self.world
        if world.journal.keep:
            world.journal.write(world.clock.now, self.name, "<-", event)
        commands = self.core.handle(event, self.now)
        for command in commands:
            if world.journal.keep:
                world.journal.write(world.clock.now, self.name, "->", command)
            self.acts[type(command)](command)
        self.handled(event, commands)
        self._arm()

    def handled(self, event: Any, commands: list[Any]) -> None:
        """For roles that watch their core."""

    # --- commands out ---

    def _publish(self, command: Publish) -> None:
        reply_to = None
        if command.reply:
            reply_to = self.world.bus.inbox(self.connection, self._reply)
        self.world.bus.publish(self.connection, command.subject, command.message, reply_to)

    def _reply(self, message: Message | NoAnswer) -> None:
        if not isinstance(message, NoAnswer):
            self.message(message, None)

    def _ask(self, command: Ask) -> None:
        self._questions += 1
        number = self._questions
        self._asked[number] = command.tag
        if not self.connection.up:
            self.later(0.0, self._settle, number, NoAnswer.DISCONNECTED)
            return

        def answered(message: Message | NoAnswer) -> None:
            if self.frozen:
                self._messages.append((self._settle, (number, message)))
            else:
                self._settle(number, message)

        mark = self.world.bus.inbox(self.connection, answered)
        self.world.bus.publish(self.connection, command.subject, command.message, mark)
        self.later(command.timeout_s, self._settle, number, NoAnswer.TIMEOUT)

    def _settle(self, number: int, answer: Message | NoAnswer) -> None:
        tag = self._asked.pop(number, None)
        if tag is None:
            return
        if isinstance(answer, NoAnswer):
            self.world.journal.count("unanswered", answer.value)
            self.handle(Unanswered(tag, answer))
        else:
            self.handle(Answered(tag, answer))

    def _answer(self, command: Answer) -> None:
        self.world.bus.answer(self.connection, command.reply_to, command.message)

    # --- time ---

    def _arm(self) -> None:
        wake = self.core.wake_at()
        if wake is not None and wake < self._armed:
            self._armed = wake
            self.world.clock.at(wake - self.clock_offset + TIMER_SLACK_S, self.soon, self._wake, wake)

    def _wake(self, at: float) -> None:
        if at != self._armed:
            return
        self._armed = float("inf")
        wake = self.core.wake_at()
        if wake is None or wake > self.now:
            self._arm()
            return
        self.handle(Tick())
        wake = self.core.wake_at()
        self._idle_ticks = self._idle_ticks + 1 if wake is not None and wake <= self.now else 0
        if self._idle_ticks > IDLE_TICKS:
            raise Violation("timers", f"{self.name}: wake_at() stays at {wake:.3f}, the past, after {IDLE_TICKS} ticks")

    # --- fate ---

    def die(self) -> None:
        self.alive = False
        self.world.bus.close(self.connection)
        self.world.bus.close(self.beats)

    def freeze(self) -> None:
        self.frozen = True
        self.freezes += 1
        self.world.clock.after(SERVER_PATIENCE_S, self._hung_up, self.freezes)

    def _hung_up(self, freeze: int) -> None:
        if self.frozen and self.freezes == freeze:
            self.world.bus.cut(self.connection)
            self.world.bus.cut(self.beats)

    def thaw(self) -> None:
        """Go on: what waited comes now, messages and timers in either order. Too long, and the server has hung up."""
        if not self.alive:
            return
        self.frozen = False
        waiting = (self._messages, self._timers)
        self._messages, self._timers = [], []
        first = self.world.rng.randrange(2)
        for call, args in waiting[first] + waiting[1 - first]:
            if self.alive:
                call(*args)
        if not self.connection.up:
            self.handle(BusDown())
            self.world.clock.after(self.world.rng.uniform(0.2, 0.5), self.bus_up)

    def bus_down(self) -> None:
        """Both connections are lost, and we know."""
        self.world.bus.cut(self.connection)
        self.world.bus.cut(self.beats)
        self.soon(self.handle, BusDown())

    def bus_up(self) -> None:
        if not self.alive or self.connection.up:
            return
        if self.world.clock.now < self.world.bus_up_at:
            self.world.clock.at(self.world.bus_up_at + 0.1, self.bus_up)
        else:
            self.world.bus.mend(self.connection)
            self.world.bus.mend(self.beats)
            self.soon(self.handle, BusUp())
