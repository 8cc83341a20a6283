"""Digests: once a second each worker says all that it holds for us, and whatever was lost on the way is mended.

A row that is not current is cancelled (only here: late rows are dropped in silence). A job that we believe there and
that the digest lacks is asked for by Resume first: the digest may have crossed its acceptance.
"""

from __future__ import annotations

from splitserve.protocol.messages import Cancel, Digest, DigestRow, KvFailed
from splitserve.protocol.states import DecodeState, FailReason, PrefillState, Role
from splitserve.router.account import Life
from splitserve.router.desk import Desk
from splitserve.router.lifecycle import Lifecycle
from splitserve.router.lives import Lives

LOADED = (DecodeState.READY, DecodeState.RUNNING, DecodeState.DONE)


def decode_row(life: Lifecycle, row: DigestRow, worker: Life, desk: Desk) -> bool:
    """Compare one job of a decode worker. False: it is not current there."""
    r, leg = life.request, life.request.decode
    if leg is None or leg.life != worker or row.attempt != leg.da:
        return False
    life.decode_accepted(leg)
    if row.state == DecodeState.FAILED:
        life.kv_failed(KvFailed(r.rid, worker[0], leg.da, leg.pa, FailReason.UNREACHABLE, "said by its digest"))
        return True
    if row.state in LOADED:
        life.loaded()
    elif row.state == DecodeState.RESERVED and r.kv is not None and desk.rules.forward_after_digest:
        life.forward()
    for choice, length in enumerate(row.progress[: r.transcript.n]):
        r.transcript.heard(choice, length)
    if r.transcript.behind or row.state == DecodeState.DONE:
        desk.chores.gap(worker, r.rid)
    return True


def prefill_row(life: Lifecycle, row: DigestRow, worker: Life, desk: Desk) -> bool:
    """Compare one job of a prefill worker. False: it is not current there."""
    r, leg = life.request, life.request.prefill
    if leg is None or leg.job is None or leg.life != worker or row.attempt != leg.pa:
        return False
    life.prefill_accepted(leg)
    done = sum(row.progress)
    known = desk.fleet.in_life(worker)
    stepping = known is not None and known.beat.step_age_ms > 0  # a chunk may take longer than our patience
    if r.kv is None and (row.state == PrefillState.QUEUED or stepping or done > leg.tokens_done):
        leg.tokens_done = max(leg.tokens_done, done)
        life.prefill_progress()
    if r.kv is None and row.state == PrefillState.HELD:
        desk.chores.gap(worker, r.rid)
    return True


def end_stale(row: DigestRow, role: str, worker: Life, desk: Desk) -> None:
    """A job that nobody wants any more."""
    desk.outbox.counts["digest_stale"] += 1
    if role == Role.PREFILL and row.state == PrefillState.HELD and row.handle_id:
        desk.chores.release(worker[0], row.handle_id, row.token)
        return
    pa, da = (row.attempt, 0) if role == Role.PREFILL else (0, row.attempt)
    cancel = Cancel(row.rid, worker[1], pa=pa, da=da, reason="not current")
    desk.outbox.publish(desk.outbox.subjects.worker_in(worker[0]), cancel)


def missing(life: Lifecycle, digest: Digest, worker: Life, listed: set[str]) -> bool:
    """We believe that this worker has it, and it says nothing of it."""
    r = life.request
    if r.rid in listed:
        return False
    if digest.role == Role.PREFILL:
        return r.prefill is not None and r.prefill.accepted and r.kv is None and r.prefill.life == worker
    return r.decode is not None and r.decode.accepted and r.decode.life == worker


def reconcile(digest: Digest, lives: Lives, desk: Desk) -> None:
    """Take a digest of a worker's present life."""
    worker = (digest.worker, digest.incarnation)
    for row in digest.rows:
        if not _current(row, digest.role, worker, lives, desk) and desk.rules.digest_cancels:
            end_stale(row, digest.role, worker, desk)
    if not desk.rules.digest_repairs:
        return
    if digest.role == Role.DECODE and desk.inbox.advance(worker, digest.stream_seq, frame=False):
        lives.frames_lost(worker)
    listed = {row.rid for row in digest.rows}
    for life in lives:
        if not missing(life, digest, worker, listed):
            continue
        if desk.rules.resume_before_replacing:
            desk.chores.gap(worker, life.request.rid)
        else:
            lives.act(life.request.rid, lambda life: lost(life, digest.role))


def _current(row: DigestRow, role: str, worker: Life, lives: Lives, desk: Desk) -> bool:
    current = False

    def compare(life: Lifecycle) -> None:
        nonlocal current
        current = (prefill_row if role == Role.PREFILL else decode_row)(life, row, worker, desk)

    lives.act(row.rid, compare)
    return current


def lost(life: Lifecycle, role: str) -> None:
    if role == Role.PREFILL:
        life.lose_prefill("not in the digest")
    else:
        life.lose_decode("not in the digest")
