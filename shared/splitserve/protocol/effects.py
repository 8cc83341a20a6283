"""What a pure core is told, and what it asks for: the border between deciding and acting (protocol D1).

    class Core(Protocol):
        def handle(self, event, now) -> list[Command]     # no await, no clock, no bus
        def wake_at(self) -> float | None                 # the earliest timer; the shell sends Tick then

A shell keeps request tags, reply subjects and time-outs; a core only names them. `now` is seconds of one
monotonic clock. Events and commands that only one core knows stand beside that core.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeVar

from splitserve.protocol.messages import Message


class NoAnswer(StrEnum):
    TIMEOUT = "timeout"
    NO_RESPONDERS = "no_responders"  # the bus knows of no subscriber: that process is gone, or reconnecting
    DISCONNECTED = "disconnected"  # our own connection is down; nothing was sent


# --- events ---


@dataclass(frozen=True, slots=True)
class Received:
    """A message came in. `reply_to` is an opaque mark to name in `Answer`; None when nobody waits."""

    message: Message
    reply_to: str | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer to an `Ask`."""

    tag: Any
    message: Message


@dataclass(frozen=True, slots=True)
class Unanswered:
    """An `Ask` without an answer. An answer that comes after this is dropped by the shell."""

    tag: Any
    why: NoAnswer


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed `wake_at()`."""


@dataclass(frozen=True, slots=True)
class BusDown:
    """Our own connection to the bus is lost."""


@dataclass(frozen=True, slots=True)
class BusUp:
    """It is back, subscriptions included."""


@dataclass(frozen=True, slots=True)
class Drain:
    """Take nothing new from now on."""


# --- commands ---


@dataclass(frozen=True, slots=True)
class Publish:
    """Send and forget; the digest repairs a loss."""

    subject: str
    message: Message
    reply: bool = False  # an answer is welcome as `Received` (Renew)


@dataclass(frozen=True, slots=True)
class Ask:
    """Send and wait for one answer: `Answered(tag)` or `Unanswered(tag)` follows, exactly once."""

    subject: str
    message: Message
    timeout_s: float
    tag: Any  # hashable, chosen by the core


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer a `Received` that had a `reply_to`."""

    reply_to: str
    message: Message


EventT = TypeVar("EventT", contravariant=True)
CommandT = TypeVar("CommandT")


class Core(Protocol[EventT, CommandT]):
    """A class that decides: `handle` is total (unknown or late input is no error) and never blocks."""

    def handle(self, event: EventT, now: float) -> list[CommandT]: ...

    def wake_at(self) -> float | None: ...
