"""One observer made of several."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from splitserve.errors import SplitserveError
from splitserve.router.observe import HttpAnswer, Observer, Progress, RequestEnd, RequestReader


class Observers:
    """Tells all of them, in order. What tokens tell is gathered: gaps, and what live requests have had. `flush` tells it, and
    a request's end."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers
        self._gaps: list[float] = []
        self._live: set[RequestObservers] = set()

    def request(self, endpoint: str) -> RequestObservers:
        told = [observer.request(endpoint) for observer in self._observers]
        return RequestObservers(self, told, self._gaps.append)

    def flush(self) -> None:
        """Tell what was gathered: for who reads, and now and then, so that it stays little."""
        self._tell_gaps()
        self._tell_progress(self._live)

    def began(self, request: RequestObservers) -> None:
        self._live.add(request)

    def ended(self, request: RequestObservers) -> None:
        self._tell_gaps()
        if request in self._live:
            self._live.remove(request)
            self._tell_progress((request,))

    def refused(self, error: SplitserveError) -> None:
        for observer in self._observers:
            observer.refused(error)

    def answered(self, answer: HttpAnswer) -> None:
        for observer in self._observers:
            observer.answered(answer)

    def _tell_gaps(self) -> None:
        if self._gaps:
            seconds = self._gaps.copy()
            self._gaps.clear()  # requests hold its `append`
            for observer in self._observers:
                observer.gaps(seconds)

    def _tell_progress(self, requests: Iterable[RequestObservers]) -> None:
        by = Progress(*map(sum, zip(Progress(), *(request.fresh() for request in requests), strict=True)))
        if any(by):
            for observer in self._observers:
                observer.progressed(by)


class RequestObservers:
    """Tells all of them of one request (`observe.RequestObserver`)."""

    def __init__(self, of: Observers, observers: list[RequestReader], gap: Callable[[float], None]) -> None:
        self.gap = gap
        self._of = of
        self._observers = observers
        self._progress: Callable[[], Progress] = Progress
        self._told = Progress()

    def live(self, progress: Callable[[], Progress]) -> None:
        self._progress = progress
        self._of.began(self)

    def fresh(self) -> Progress:
        """What it has had since the last time."""
        before, self._told = self._told, self._progress()
        return Progress(*(now - then for now, then in zip(self._told, before, strict=True)))

    def tokenised(self, seconds: float) -> None:
        for observer in self._observers:
            observer.tokenised(seconds)

    def first_token(self, seconds: float) -> None:
        for observer in self._observers:
            observer.first_token(seconds)

    def end(self, end: RequestEnd) -> None:
        self._of.ended(self)
        for observer in self._observers:
            observer.end(end)
