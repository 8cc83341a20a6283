"""What must be said to workers beside the jobs: FinAck in batches, Release with tries, Renew, Resume one at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from splitserve.protocol.effects import NoAnswer
from splitserve.protocol.handle import KvHandle
from splitserve.protocol.messages import FinAck, Message, Release, Renew, RenewAnswer, Resume, ResumeAnswer, ResumeRow
from splitserve.protocol.trace import NO_TRACE, TraceContext
from splitserve.router.account import Life
from splitserve.router.outbox import Outbox

FIN_ACK_S = 0.2
RELEASE_S = 0.3
RELEASE_TRIES = 3
RENEW_S = 3.0
RESUME_S = 0.5


@dataclass(frozen=True, slots=True)
class ReleaseTag:
    owner: str
    handle_id: str
    token: str
    trace: TraceContext
    tries: int = 1


@dataclass(frozen=True, slots=True)
class ResumeTag:
    life: Life


@dataclass(frozen=True, slots=True)
class FinAckTimer:
    life: Life


@dataclass(frozen=True, slots=True)
class RenewTimer:
    pass


class Chores:
    """Batches and retries that belong to no single request's state."""

    def __init__(self, outbox: Outbox) -> None:
        self._out = outbox
        self._slots: dict[Life, list[int]] = {}
        self._renewed: dict[str, str] = {}  # handle id -> owner
        self._resuming: set[Life] = set()
        self._gaps: dict[Life, dict[str, None]] = {}  # request ids to ask for, in order

    # --- FinAck ---

    def fin_ack(self, life: Life, slot: int) -> None:
        """The router has all of this slot; said with others of the next 200 ms."""
        slots = self._slots.setdefault(life, [])
        if not slots:
            self._out.timers.set(FinAckTimer(life), self._out.now + FIN_ACK_S)
        slots.append(slot)

    def send_fin_acks(self, life: Life) -> None:
        self._out.timers.clear(FinAckTimer(life))
        slots = self._slots.pop(life, None)
        if slots:
            ack = FinAck(self._out.router, life[1], tuple(slots))
            self._out.publish(self._out.subjects.worker_in(life[0]), ack)

    # --- leases ---

    def release(self, owner: str, handle_id: str, token: str, trace: TraceContext = NO_TRACE) -> None:
        self._renewed.pop(handle_id, None)
        self._ask_release(ReleaseTag(owner, handle_id, token, trace))

    def release_unanswered(self, tag: ReleaseTag, why: NoAnswer) -> None:
        """Tried again after a time-out; else the lease's end frees the blocks."""
        if why is NoAnswer.TIMEOUT and tag.tries < RELEASE_TRIES:
            self._ask_release(replace(tag, tries=tag.tries + 1))

    def _ask_release(self, tag: ReleaseTag) -> None:
        subject = self._out.subjects.worker_lease(tag.owner)
        self._out.ask(subject, Release(tag.handle_id, tag.token, tag.trace), RELEASE_S, tag)

    def keep(self, handle: KvHandle) -> None:
        """Renew this lease every 3 s until `let_go`."""
        if not self._renewed:
            self._out.timers.set(RenewTimer(), self._out.now + RENEW_S)
        self._renewed[handle.id] = handle.owner

    def let_go(self, handle: KvHandle) -> None:
        self._renewed.pop(handle.id, None)

    def renew(self) -> None:
        owners: dict[str, list[str]] = {}
        for handle_id, owner in self._renewed.items():
            owners.setdefault(owner, []).append(handle_id)
        for owner, ids in owners.items():
            self._out.publish(self._out.subjects.worker_lease(owner), Renew(tuple(ids)), reply=True)
        if owners:
            self._out.timers.set(RenewTimer(), self._out.now + RENEW_S)

    def renew_answered(self, answer: RenewAnswer) -> None:
        for handle_id in answer.unknown:
            self._renewed.pop(handle_id, None)

    # --- Resume ---

    def gap(self, life: Life, rid: str) -> None:
        """Something of this request was lost on its way from this worker."""
        self._gaps.setdefault(life, {})[rid] = None

    def gaps_to_ask(self) -> list[tuple[Life, list[str]]]:
        """Workers that may be asked now, one Resume under way each, with the requests to ask for. Takes them."""
        ready = [life for life in self._gaps if life not in self._resuming]
        return [(life, list(self._gaps.pop(life))) for life in ready]

    def resume(self, life: Life, rows: tuple[ResumeRow, ...]) -> None:
        self._resuming.add(life)
        message = Resume(self._out.router, life[1], rows)
        self._out.ask(self._out.subjects.worker_in(life[0]), message, RESUME_S, ResumeTag(life))

    def resume_ended(self, tag: ResumeTag, answer: Message | None) -> tuple[tuple[str, int], ...]:
        """The (rid, attempt) that the worker does not hold. Without an answer the next digest asks again."""
        self._resuming.discard(tag.life)
        return answer.unknown if isinstance(answer, ResumeAnswer) else ()

    def forget(self, life: Life) -> None:
        """That life is over."""
        self._gaps.pop(life, None)
        self._slots.pop(life, None)
        self._out.timers.clear(FinAckTimer(life))
