"""One observer made of several."""

from __future__ import annotations

from splitserve.errors import SplitserveError
from splitserve.router.observe import HttpAnswer, Observer, RequestEnd, RequestObserver


class Observers:
    """Tells all of them, in order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def request(self, endpoint: str) -> RequestObservers:
        return RequestObservers([observer.request(endpoint) for observer in self._observers])

    def refused(self, error: SplitserveError) -> None:
        for observer in self._observers:
            observer.refused(error)

    def answered(self, answer: HttpAnswer) -> None:
        for observer in self._observers:
            observer.answered(answer)


class RequestObservers:
    """Tells all of them of one request."""

    def __init__(self, observers: list[RequestObserver]) -> None:
        self._observers = observers
        self._gaps = tuple(observer.gap for observer in observers)  # one a token

    def tokenised(self, seconds: float) -> None:
        for observer in self._observers:
            observer.tokenised(seconds)

    def first_token(self, seconds: float) -> None:
        for observer in self._observers:
            observer.first_token(seconds)

    def gap(self, seconds: float) -> None:
        for gap in self._gaps:
            gap(seconds)

    def end(self, end: RequestEnd) -> None:
        for observer in self._observers:
            observer.end(end)
