"""What the router's core is told and asks for, beside `protocol.effects`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from splitserve.errors import SplitserveError
from splitserve.protocol.effects import Answered, Ask, BusDown, BusUp, Publish, Received, Tick, Unanswered
from splitserve.router.generation import GenerationEvent, Submission
from splitserve.router.records import Record

# --- events ---


@dataclass(frozen=True, slots=True)
class Submit:
    """A request came in. Its life ends with exactly one `Deliver(rid, Done)`."""

    submission: Submission


@dataclass(frozen=True, slots=True)
class Stop:
    """A stop string was met in one answer: it needs no more tokens."""

    rid: str
    choice: int


@dataclass(frozen=True, slots=True)
class Leave:
    """Nobody waits for it: the client is gone, or `error` ended what it was a part of (a request of several prompts)."""

    rid: str
    error: SplitserveError | None = None


# --- commands ---


class Deliver(NamedTuple):
    """Something for the client. `cached_tokens`: prompt tokens that were not computed, final from the first event on."""

    rid: str
    event: GenerationEvent
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Save:
    """The latest state of a request, for the store. A later one of the same rid replaces it."""

    record: Record


@dataclass(frozen=True, slots=True)
class Crashed:
    """Handling an event raised. `rid` names the request that was failed for it; "" when it belonged to none."""

    rid: str
    error: Exception


RouterEvent = Received | Answered | Unanswered | Tick | BusDown | BusUp | Submit | Stop | Leave
RouterCommand = Publish | Ask | Deliver | Save | Crashed
