"""What every part of the router's core writes to: commands of the event under way, and the one set of timers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from splitserve.protocol.effects import Ask, Publish
from splitserve.protocol.messages import Message
from splitserve.protocol.subjects import Subjects
from splitserve.router.effects import RouterCommand
from splitserve.router.timers import Timers


class Outbox:
    """`now` is that of the event being handled; `router` names this life on the bus."""

    def __init__(self, router: str, subjects: Subjects) -> None:
        self.router = router
        self.subjects = subjects
        self.timers = Timers()
        self.counts: Counter[str] = Counter()
        self.now = 0.0
        self._commands: list[RouterCommand] = []

    def put(self, command: RouterCommand) -> None:
        self._commands.append(command)

    def publish(self, subject: str, message: Message, *, reply: bool = False) -> None:
        self.put(Publish(subject, message, reply))

    def ask(self, subject: str, message: Message, timeout_s: float, tag: Hashable) -> None:
        self.put(Ask(subject, message, timeout_s, tag))

    def take(self) -> list[RouterCommand]:
        """The commands so far; the box is empty then."""
        commands, self._commands = self._commands, []
        return commands
