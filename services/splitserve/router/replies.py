"""Answers to what we asked, and silence. Who answers lives; whom the bus does not know is dead now."""

from __future__ import annotations

from dataclasses import dataclass

from splitserve.protocol.effects import Answered, NoAnswer, Unanswered
from splitserve.protocol.messages import Accepted, Message, Refused
from splitserve.router.account import Life
from splitserve.router.chores import ReleaseTag, ResumeTag
from splitserve.router.desk import Desk, Wait
from splitserve.router.legs import JobKind, JobTag
from splitserve.router.lifecycle import Lifecycle
from splitserve.router.lives import Lives

AGAIN_S = 0.1


@dataclass(frozen=True, slots=True)
class PingTag:
    life: Life


class Replies:
    """Routes the end of every question by its tag."""

    def __init__(self, lives: Lives, desk: Desk) -> None:
        self._lives = lives
        self._desk = desk

    def answered(self, event: Answered) -> None:
        tag, fleet, now = event.tag, self._desk.fleet, self._desk.now
        if isinstance(tag, JobTag):
            fleet.heard(self._lives.asked_worker(tag), now)
            act = prefill_answered if tag.kind is JobKind.PREFILL else decode_answered
            self._lives.act(tag.rid, lambda life: act(life, tag, event.message))
        elif isinstance(tag, PingTag):
            fleet.pinged(tag.life, answered=True, gone=False, now=now)
        elif isinstance(tag, ResumeTag):
            fleet.heard(tag.life, now)
            self._lives.unknown(tag.life, self._desk.chores.resume_ended(tag, event.message))

    def unanswered(self, event: Unanswered) -> None:
        tag, why, fleet, now = event.tag, event.why, self._desk.fleet, self._desk.now
        gone = why is NoAnswer.NO_RESPONDERS
        if isinstance(tag, JobTag):
            if gone:
                self._lives.lose_worker(fleet.no_responders(self._lives.asked_worker(tag), now))
            act = prefill_unanswered if tag.kind is JobKind.PREFILL else decode_unanswered
            self._lives.act(tag.rid, lambda life: act(life, tag, why, self._desk))
        elif isinstance(tag, PingTag):
            self._lives.lose_worker(fleet.pinged(tag.life, answered=False, gone=gone, now=now))
        elif isinstance(tag, ResumeTag):
            if gone:
                self._lives.lose_worker(fleet.no_responders(tag.life, now))
            self._desk.chores.resume_ended(tag, None)
        elif isinstance(tag, ReleaseTag):
            self._desk.chores.release_unanswered(tag, why)


# --- a job's: only of the number that is current ---


def decode_answered(life: Lifecycle, tag: JobTag, answer: Message) -> None:
    leg = life.request.decode
    if leg is None or leg.da != tag.number:
        return
    if isinstance(answer, Accepted):
        life.decode_accepted(leg)
    elif isinstance(answer, Refused):
        life.decode_refused(leg, answer)


def decode_unanswered(life: Lifecycle, tag: JobTag, why: NoAnswer, desk: Desk) -> None:
    leg = life.request.decode
    if leg is not None and leg.tag == tag and not leg.accepted and not _pauses(life, why, desk):
        life.decode_silent(leg, why)


def prefill_answered(life: Lifecycle, tag: JobTag, answer: Message) -> None:
    leg = life.request.prefill
    if leg is None or leg.pa != tag.number or life.request.kv is not None:
        return
    if isinstance(answer, Accepted):
        life.prefill_accepted(leg)
    elif isinstance(answer, Refused):
        life.prefill_refused(leg, answer)


def prefill_unanswered(life: Lifecycle, tag: JobTag, why: NoAnswer, desk: Desk) -> None:
    leg = life.request.prefill
    if leg is not None and leg.tag(tag.rid) == tag and not leg.accepted and not _pauses(life, why, desk):
        life.lose_prefill("no answer")


def _pauses(life: Lifecycle, why: NoAnswer, desk: Desk) -> bool:
    """Our bus is to blame: not an answer, asked again when it is back."""
    if desk.bus_down:
        return True
    blame = why is NoAnswer.DISCONNECTED or (why is NoAnswer.NO_RESPONDERS and desk.bus_sick)
    if blame:
        life.request.timer(Wait.AGAIN, AGAIN_S)
    return blame
