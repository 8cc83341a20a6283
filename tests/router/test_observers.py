"""Several observers hear as one; gaps are told in bulk, and none is lost or told twice."""

from __future__ import annotations

from collections.abc import Sequence

from splitserve.router.observe import NullObserver, RequestEnd
from splitserve.router.observers import Observers


class Hearing(NullObserver):
    def __init__(self) -> None:
        self.heard: list[float | str] = []

    def request(self, endpoint: str) -> Hearing:
        return self

    def gaps(self, seconds: Sequence[float]) -> None:
        self.heard.extend(seconds)

    def end(self, end: RequestEnd) -> None:
        self.heard.append(end.outcome)


def test_gaps_of_all_requests_are_told_at_a_flush_to_everybody_once() -> None:
    first, second = Hearing(), Hearing()
    observers = Observers(first, second)
    a, b = observers.request("/a"), observers.request("/b")
    a.gap(0.1)
    b.gap(0.2)
    assert first.heard == []
    observers.flush()
    observers.flush()
    assert first.heard == second.heard == [0.1, 0.2]


def test_a_request_has_told_its_gaps_before_its_end() -> None:
    hearing = Hearing()
    request = Observers(hearing).request("/a")
    request.gap(0.1)
    request.end(RequestEnd("finished", 1.0))
    assert hearing.heard == [0.1, "finished"]
