"""Several observers hear as one; gaps are told in bulk, and none is lost or told twice."""

from __future__ import annotations

from collections.abc import Sequence

from splitserve.router.observe import NullObserver, Progress, RequestEnd
from splitserve.router.observers import Observers


class Hearing(NullObserver):
    def __init__(self) -> None:
        self.heard: list[float | str | Progress] = []

    def request(self, endpoint: str) -> Hearing:
        return self

    def gaps(self, seconds: Sequence[float]) -> None:
        self.heard.extend(seconds)

    def progressed(self, by: Progress) -> None:
        self.heard.append(by)

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


def test_what_live_requests_have_had_is_told_as_it_grows_and_each_token_once() -> None:
    hearing = Hearing()
    observers = Observers(hearing)
    first, second = observers.request("/a"), observers.request("/b")
    had = {"first": Progress(), "second": Progress(1, 10, 4)}
    first.live(lambda: had["first"])
    second.live(lambda: had["second"])
    observers.flush()
    had |= {"first": Progress(3, 20, 0), "second": Progress(5, 10, 4)}
    observers.flush()
    observers.flush()
    had["first"] = Progress(4, 20, 0)
    first.end(RequestEnd("cancelled", 1.0))
    observers.flush()
    assert hearing.heard == [Progress(1, 10, 4), Progress(7, 20, 0), Progress(1, 0, 0), "cancelled"]


def test_a_request_that_ended_is_asked_no_more() -> None:
    observers = Observers(NullObserver())
    request, asked = observers.request("/a"), list[int]()

    def progress() -> Progress:
        asked.append(1)
        return Progress()

    request.live(progress)
    request.end(RequestEnd("finished", 1.0))
    observers.flush()
    assert len(asked) == 1
