"""A lossy NATS: subjects, connections that break in two ways, questions with answers. No process is known here.

Of one sender on one subject, messages stay in order; between senders nothing is promised. A message is published to
whoever is subscribed when it arrives, as on a server. Beats ride on connections of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from simulation.clock import Clock
from simulation.faults import MessageFaults
from simulation.journal import Journal
from splitserve.protocol.codec import decode, encode
from splitserve.protocol.effects import NoAnswer
from splitserve.protocol.messages import Message

Handler = Callable[[Message, str | None], None]
Inbox = Callable[[Message | NoAnswer], None]


@dataclass(eq=False, slots=True)
class Connection:
    """One process's line to the server.

    `up`: the server and the process both believe in it. `held`: a partition that nobody has noticed yet; what passes waits
    here, and comes late or never.
    """

    name: str
    up: bool = True
    held: list[tuple[Callable[..., None], tuple[Any, ...]]] | None = None
    sent: dict[str, float] = field(default_factory=dict[str, float])  # subject -> when its last message arrives


class Bus:
    """The server."""

    def __init__(
        self, clock: Clock, faults: MessageFaults, journal: Journal, all_beats: str, *, as_bytes: bool = False
    ) -> None:
        self._clock = clock
        self._faults = faults
        self._journal = journal
        self._subscribers: dict[str, list[tuple[Connection, Handler]]] = {}
        self._inboxes: dict[str, tuple[Connection, Inbox]] = {}
        self._as_bytes = as_bytes  # through the codec, as between real processes
        self._marks = 0
        self._all_beats = all_beats
        self._beats = all_beats.removesuffix(">")

    # --- what processes call ---

    def subscribe(self, connection: Connection, subject: str, handler: Handler) -> None:
        self._subscribers.setdefault(subject, []).append((connection, handler))

    def close(self, connection: Connection) -> None:
        """The process is gone, and its subscriptions with it."""
        connection.up = False
        for subscribers in self._subscribers.values():
            subscribers[:] = [s for s in subscribers if s[0] is not connection]

    def inbox(self, connection: Connection, inbox: Inbox) -> str:
        """A reply mark; `inbox` hears the answers that come to it, or that there was nobody to ask."""
        self._marks += 1
        mark = f"{connection.name}#{self._marks}"
        self._inboxes[mark] = (connection, inbox)
        return mark

    def publish(self, connection: Connection, subject: str, message: Message, reply_to: str | None = None) -> None:
        """Send to all subscribers; lost without a word if the connection is down."""
        self._send(connection, subject, message, self._arrive, subject, message, reply_to)

    def answer(self, connection: Connection, reply_to: str, message: Message) -> None:
        self._send(connection, reply_to, message, self._arrive_answer, reply_to, message)

    # --- what breaks ---

    def cut(self, connection: Connection) -> None:
        """The line breaks and both sides know; what was held in it is lost."""
        connection.up = False
        connection.held = None

    def hush(self, connection: Connection) -> None:
        """The line goes dead and nobody knows yet."""
        if connection.up and connection.held is None:
            connection.held = []

    def mend(self, connection: Connection) -> None:
        """The line works again; what was held arrives now."""
        held, connection.held, connection.up = connection.held, None, True
        for call, args in held or ():
            call(*args)

    # --- inside ---

    def _send(self, connection: Connection, lane: str, message: Message, call: Callable[..., None], *args: Any) -> None:
        kind = type(message).__name__
        if not connection.up:
            self._journal.count("message lost, line down", kind)
            return
        if connection.held is not None:
            connection.held.append((self._send, (connection, lane, message, call, *args)))
            return
        delays, fault = self._faults.copies(message)
        self._journal.counts["message", kind] += 1
        if fault is not None:
            self._journal.count(f"message fault: {fault}", kind)
            self._journal.write(self._clock.now, connection.name, f"!{fault}", message)
        now = self._clock.now
        for number, delay in enumerate(delays):
            when = now + delay
            if number == 0:
                when = connection.sent[lane] = max(when, connection.sent.get(lane, 0.0))
            self._clock.at(when, call, *args)

    def _arrive(self, subject: str, message: Message, reply_to: str | None) -> None:
        reached = False
        if subject.startswith(self._beats):
            subject = self._all_beats
        message = self._carried(message)
        for connection, handler in tuple(self._subscribers.get(subject, ())):
            reached = reached or connection.up
            self._deliver(connection, handler, message, reply_to)
        if not reached and reply_to is not None:
            connection, inbox = self._inboxes[reply_to]
            self._deliver(connection, inbox, NoAnswer.NO_RESPONDERS)

    def _arrive_answer(self, reply_to: str, message: Message) -> None:
        connection, inbox = self._inboxes[reply_to]
        self._deliver(connection, inbox, self._carried(message))

    def _carried(self, message: Message) -> Message:
        return decode(encode(message)) if self._as_bytes else message

    def _deliver(self, connection: Connection, call: Callable[..., None], *args: Any) -> None:
        if connection.held is not None:
            connection.held.append((call, args))
        elif connection.up:
            call(*args)
