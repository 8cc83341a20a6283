"""Marks of what ended."""

from __future__ import annotations

from splitserve.protocol.messages import Refused
from splitserve.protocol.states import RefuseReason
from splitserve.worker.tombstones import Tombstones

FULL = Refused(RefuseReason.FULL, "full")


def test_a_mark_covers_its_attempt_and_all_lower_ones() -> None:
    marks = Tombstones(60, 10)
    marks.put("a", 3, 0.0)
    assert [marks.over("a", attempt) is not None for attempt in (1, 3, 4)] == [True, True, False]
    assert marks.over("b", 1) is None


def test_a_lower_attempts_end_does_not_revive_a_higher_one() -> None:
    marks = Tombstones(60, 10)
    marks.put("a", 3, 0.0, FULL)
    marks.put("a", 2, 1.0)
    mark = marks.over("a", 3)
    assert mark is not None
    assert (mark.attempt, mark.refused, mark.until) == (3, FULL, 61.0)


def test_marks_leave_by_time_and_the_oldest_by_number() -> None:
    marks = Tombstones(60, 2)
    for at, rid in enumerate("abc"):
        marks.put(rid, 1, float(at))
    assert [rid for rid in "abc" if marks.over(rid, 1)] == ["b", "c"]
    assert marks.next_expiry() == 61.0
    marks.expire(61.0)
    assert [rid for rid in "abc" if marks.over(rid, 1)] == ["c"]
    marks.expire(62.0)
    assert (len(marks), marks.next_expiry()) == (0, None)
