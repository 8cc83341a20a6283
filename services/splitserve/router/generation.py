"""The border between the OpenAI endpoints and the request's life: one submission in, its events told one by one.

Ids only: text, stop strings and the wire format of answers are the endpoint's; workers, attempts and retries are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from splitserve.errors import SplitserveError
from splitserve.protocol.params import SamplingParams, TokenLogprob
from splitserve.protocol.states import PROBE_ID as PROBE_ID
from splitserve.protocol.states import FinishReason
from splitserve.protocol.trace import NO_TRACE, TraceContext


@dataclass(frozen=True, slots=True)
class Submission:
    """One prompt, n = len(seeds) answers."""

    rid: str  # ours, unique: what /v1/requests/{id} takes
    model: str
    ids: tuple[int, ...]
    params: SamplingParams
    seeds: tuple[int, ...]
    timeout_s: float
    priority: int = 0
    cache_salt: str = ""
    split: str = ""  # overrides --split for this one (the readiness probe forces "always")
    created: float = 0.0  # wall clock, for the record only
    client_request_id: str = ""  # X-Request-Id as sent; an attribute, never a key
    tokenise_s: float = 0.0  # what the endpoint spent on making ids of it
    trace: TraceContext = NO_TRACE  # what its messages to workers carry


class Tokens(NamedTuple):
    """New tokens of one answer; each index is delivered once, in order, whatever dies."""

    choice: int
    first_index: int
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """An answer's end as the worker saw it."""

    choice: int
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Done:
    """The request's end; nothing follows. `error` None: every answer finished (or was stopped by us)."""

    error: SplitserveError | None = None
    cached_tokens: int = 0
    stages: dict[str, float] = field(default_factory=dict[str, float])
    preemptions: int = 0  # how often it gave way to others


GenerationEvent = Tokens | Finished | Done
Hear = Callable[[GenerationEvent], None]  # called from the event loop; it only enqueues


class Generation(Protocol):
    """A running request. Leaving `async with` at any moment ends the work on every worker: by an error of ours it failed,
    else the client left."""

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed; known from the first event on."""
        ...

    def stop(self, choice: int) -> None:
        """A stop string was met: this answer needs no more tokens. It ends like a finish."""
        ...

    async def __aenter__(self) -> Generation: ...

    async def __aexit__(self, *exc: object) -> None: ...


class Generator(Protocol):
    """What an endpoint needs of the router."""

    def submit(self, submission: Submission, hear: Hear) -> Generation:
        """Admit a request; once it is entered, `hear` is told each event as it comes, up to and including Done.

        Raises Overloaded (429), BusUnavailable, NoWorkers (503): before anything was sent to a worker.
        """
        ...
