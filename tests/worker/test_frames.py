"""Rows into frames."""

from __future__ import annotations

from splitserve.protocol.messages import DecodeDurations, FirstRow, TokenFrame, TokenRow
from splitserve.protocol.params import TokenLogprob
from splitserve.protocol.states import FinishReason
from splitserve.protocol.subjects import Subjects
from splitserve.worker.frames import Frames


def frames_of(frames: Frames) -> list[TokenFrame]:
    return [c.message for c in frames.flush() if isinstance(c.message, TokenFrame)]


def test_a_long_row_is_cut_and_loses_nothing() -> None:
    frames = Frames("w", 1, Subjects(), 4)
    ids = tuple(range(10))
    logprobs = tuple(TokenLogprob(-float(i), 1) for i in ids)
    first = FirstRow(0, 2, DecodeDurations(0.1, 0.2, 0.3))
    frames.add("r", TokenRow(3, 1, 20, ids, FinishReason.STOP, first, logprobs))
    frames.add("r", TokenRow(4, 1, 0, (7,)))
    sent = frames_of(frames)
    rows = [row for frame in sent for row in frame.rows()]
    assert [frame.stream_seq for frame in sent] == [1, 2, 3]
    assert [(row.slot, row.first_index, len(row.ids)) for row in rows] == [
        (3, 20, 4),
        (3, 24, 4),
        (3, 28, 2),
        (4, 0, 1),
    ]
    assert sum((row.ids for row in rows), ()) == (*ids, 7)
    assert sum((row.logprobs for row in rows), ()) == logprobs
    assert [row.finish for row in rows] == [0, 0, FinishReason.STOP, 0]
    assert [row.first for row in rows] == [first, None, None, None]


def test_a_row_without_ids_still_tells_its_end() -> None:
    frames = Frames("w", 1, Subjects(), 4)
    frames.add("r", TokenRow(0, 1, 5, (), FinishReason.ERROR))
    (frame,) = frames_of(frames)
    assert list(frame.rows()) == [TokenRow(0, 1, 5, (), FinishReason.ERROR)]
    assert frames_of(frames) == []
    assert (frames.last("r"), frames.last("other")) == (1, 0)
