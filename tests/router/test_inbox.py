"""Slots and streams; and the transcript, where each index is taken once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from splitserve.protocol.states import FinishReason
from splitserve.router.generation import Finished, Tokens
from splitserve.router.inbox import Inbox, SlotOwner
from splitserve.router.transcript import Transcript

W = ("d0", 1)


def test_slots_count_up_and_are_never_used_again():
    inbox = Inbox()
    assert inbox.open("a", 3) == 0
    inbox.close(0, 3)
    assert inbox.open("b", 1) == 3
    assert inbox.owner(0) is None
    assert inbox.owner(3) == SlotOwner("b", 0)


def test_switched_off_slots_are_used_again():
    inbox = Inbox(fresh_slots=False)
    inbox.open("a", 2)
    inbox.open("b", 1)
    inbox.close(0, 2)
    assert inbox.open("c", 3) == 3
    assert inbox.open("d", 2) == 0


def test_each_slot_of_several_answers_names_its_choice():
    inbox = Inbox()
    first = inbox.open("a", 2)
    assert [inbox.owner(first + i) for i in range(2)] == [SlotOwner("a", 0), SlotOwner("a", 1)]


def test_a_frame_number_that_was_jumped_over_is_a_gap():
    inbox = Inbox()
    assert not inbox.advance(W, 1, frame=True)
    assert not inbox.advance(W, 2, frame=True)
    assert inbox.advance(W, 4, frame=True)
    assert not inbox.advance(W, 3, frame=True)
    assert not inbox.advance(W, 5, frame=True)


def test_a_digest_that_names_a_later_frame_is_a_gap():
    inbox = Inbox()
    assert not inbox.advance(W, 0, frame=False)
    inbox.advance(W, 1, frame=True)
    assert not inbox.advance(W, 1, frame=False)
    assert inbox.advance(W, 2, frame=False)


def test_each_life_of_a_worker_counts_for_itself():
    inbox = Inbox()
    inbox.advance(W, 5, frame=False)
    assert not inbox.advance(("d0", 2), 1, frame=True)


def test_a_row_behind_a_gap_gives_nothing_and_is_remembered_as_missing():
    transcript = Transcript(1)
    assert transcript.append(0, 2, (3, 4)) == []
    assert transcript.behind
    assert transcript.append(0, 0, (1, 2)) == [Tokens(0, 0, (1, 2))]
    assert transcript.behind
    assert transcript.append(0, 1, (2, 3, 4)) == [Tokens(0, 2, (3, 4))]
    assert not transcript.behind


def test_an_end_comes_only_with_every_token_before_it():
    transcript = Transcript(1)
    assert transcript.append(0, 1, (2,), finish=FinishReason.STOP) == []
    assert not transcript.closed
    events = transcript.append(0, 0, (1, 2), finish=FinishReason.STOP)
    assert events == [Tokens(0, 0, (1, 2)), Finished(0, FinishReason.STOP)]
    assert transcript.closed
    assert transcript.append(0, 2, (3,)) == []


def test_a_lost_end_that_comes_without_tokens_is_taken():
    transcript = Transcript(1)
    transcript.append(0, 0, (1,))
    assert transcript.append(0, 1, (), finish=FinishReason.LENGTH) == [Finished(0, FinishReason.LENGTH)]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 8)), max_size=60))
def test_whatever_pieces_come_in_whatever_order_the_answer_is_a_gapless_prefix(pieces: list[tuple[int, int]]):
    reference = list(range(100, 128))
    transcript = Transcript(1)
    seen: list[int] = []
    for first, count in pieces:
        for event in transcript.append(0, first, tuple(reference[first : first + count])):
            assert isinstance(event, Tokens)
            assert event.first_index == len(seen)
            seen += event.ids
    assert seen == reference[: len(seen)] == transcript.outputs[0]
