"""What the endpoints report of each request; metrics are one reader of it. Calls are cheap and never fail a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from splitserve.errors import SplitserveError

Outcome = Literal["finished", "cancelled", "failed"]


@dataclass(frozen=True, slots=True)
class RequestEnd:
    """One HTTP request's end. Seconds are of this process's monotonic clock, counted from the request's arrival."""

    outcome: Outcome
    seconds: float
    code: str = ""  # of the error that ended it
    refused: str = ""  # why it was not taken, when that is why it failed
    finish_reasons: tuple[str, ...] = ()  # an entry an answer that finished: "stop", "length"
    prompt_tokens: tuple[int, ...] = ()  # an entry a prompt
    cached_tokens: int = 0
    generation_tokens: tuple[int, ...] = ()  # an entry an answer
    n: int = 1
    max_tokens: int = 0
    first_token_s: float | None = None
    last_token_s: float | None = None
    detokenise_s: float = 0.0  # spent on the first tokens' text
    stages: tuple[Mapping[str, float], ...] = field(default=())  # `Done.stages`, an entry a prompt
    preemptions: int = 0  # how often it gave way to others


class Progress(NamedTuple):
    """What a request has had so far, in tokens. A prompt counts from its first token on, once however many its answers."""

    generated: int = 0
    prompt: int = 0
    cached: int = 0  # of the prompts' tokens, those that were not computed


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """One HTTP answer. `path`: the route's template, "" when there is none; `status` 0: the client left before it."""

    method: str
    path: str
    status: int
    seconds: float
    received: int  # bytes of bodies
    sent: int


class RequestReader(Protocol):
    """Told about one request, in this order; `end` exactly once."""

    def tokenised(self, seconds: float) -> None: ...

    def first_token(self, seconds: float) -> None:
        """From arrival to the first tokens, made text."""
        ...

    def end(self, end: RequestEnd) -> None: ...


class RequestObserver(RequestReader, Protocol):
    """The same from where a request is answered: of its tokens too, before its end."""

    def live(self, progress: Callable[[], Progress]) -> None:
        """Ask this now and then, and a last time at `end`: counting so costs a token nothing."""
        ...

    def gap(self, seconds: float, /) -> None:
        """Between two token events of one answer, as they arrived (not as a slow client read them)."""
        ...


class Observer(Protocol):
    """Told about all requests, by `Observers`."""

    def request(self, endpoint: str) -> RequestReader:
        """A generation request was read and found valid; `endpoint` is its path."""
        ...

    def refused(self, error: SplitserveError) -> None:
        """A generation request was refused before that."""
        ...

    def answered(self, answer: HttpAnswer) -> None:
        """An HTTP answer ended."""
        ...

    def gaps(self, seconds: Sequence[float]) -> None:
        """What requests were told by `gap` since the last time."""
        ...

    def progressed(self, by: Progress) -> None:
        """What all requests together have had since the last time."""
        ...


class NullObserver:
    """Tells nobody."""

    def request(self, endpoint: str) -> NullObserver:
        return self

    def tokenised(self, seconds: float) -> None: ...

    def first_token(self, seconds: float) -> None: ...

    def live(self, progress: Callable[[], Progress]) -> None: ...

    def gap(self, seconds: float) -> None: ...

    def end(self, end: RequestEnd) -> None: ...

    def refused(self, error: SplitserveError) -> None: ...

    def answered(self, answer: HttpAnswer) -> None: ...

    def gaps(self, seconds: Sequence[float]) -> None: ...

    def progressed(self, by: Progress) -> None: ...
