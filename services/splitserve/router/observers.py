"""One observer made of several."""

from __future__ import annotations

from collections.abc import Callable

from splitserve.errors import SplitserveError
from splitserve.router.observe import HttpAnswer, Observer, RequestEnd, RequestReader


class Observers:
    """Tells all of them, in order. Gaps, one a token, are gathered: `flush` tells them, and so does a request's end."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers
        self._gaps: list[float] = []

    def request(self, endpoint: str) -> RequestObservers:
        told = [observer.request(endpoint) for observer in self._observers]
        return RequestObservers(told, self._gaps.append, self.flush)

    def flush(self) -> None:
        """Tell what was gathered: for who reads, and now and then, so that it stays little."""
        if self._gaps:
            seconds = self._gaps.copy()
            self._gaps.clear()  # requests hold its `append`
            for observer in self._observers:
                observer.gaps(seconds)

    def refused(self, error: SplitserveError) -> None:
        for observer in self._observers:
            observer.refused(error)

    def answered(self, answer: HttpAnswer) -> None:
        for observer in self._observers:
            observer.answered(answer)


class RequestObservers:
    """Tells all of them of one request (`observe.RequestObserver`)."""

    def __init__(self, observers: list[RequestReader], gap: Callable[[float], None], flush: Callable[[], None]) -> None:
        self.gap = gap
        self._observers = observers
        self._flush = flush

    def tokenised(self, seconds: float) -> None:
        for observer in self._observers:
            observer.tokenised(seconds)

    def first_token(self, seconds: float) -> None:
        for observer in self._observers:
            observer.first_token(seconds)

    def end(self, end: RequestEnd) -> None:
        self._flush()
        for observer in self._observers:
            observer.end(end)
