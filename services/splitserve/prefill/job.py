"""One job of a prefill worker, and the handle that its blocks are held under.

The handle of a long prompt is made with its first chunk: whole blocks may be read while the rest is computed.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

from splitserve.engine import door
from splitserve.kv.lease import LeaseTable
from splitserve.protocol.handle import GroupBlocks, KvHandle
from splitserve.protocol.messages import Accepted, DigestRow, KvReady, PrefillDurations, PrefillJob
from splitserve.protocol.states import PrefillState, is_probe
from splitserve.worker.effects import Identity

Key = tuple[str, int]  # (rid, pa): what the engine knows a job by


def random_token() -> str:
    return secrets.token_hex(16)


@dataclass(slots=True)
class Job:
    """One attempt."""

    asked: PrefillJob
    answer: Accepted
    deadline: float
    blocks: int
    state: PrefillState = PrefillState.QUEUED
    computed: int = 0  # tokens, cached ones included
    handle: KvHandle | None = None  # of all blocks that others may read; `ready` has the final one
    ready: KvReady | None = None

    @property
    def key(self) -> Key:
        return (self.asked.rid, self.asked.pa)

    @property
    def tokens_left(self) -> int:
        return 0 if self.state is PrefillState.HELD else len(self.asked.ids) - self.computed

    @property
    def blocks_unheld(self) -> int:
        """Blocks that it needs beside those under its lease."""
        return self.blocks - held_by(self.handle) if self.ready is None else 0

    @property
    def addition(self) -> door.Add:
        """What the engine is told of it."""
        asked = self.asked
        return door.Add(
            key=self.key,
            mode=door.Mode.PREFILL,
            ids=asked.ids,
            prompt_len=asked.prompt_len,
            outputs=(asked.ids[asked.prompt_len :],) if len(asked.seeds) == 1 else ((),) * len(asked.seeds),
            params=asked.params,
            seeds=asked.seeds,
            priority=asked.priority,
            cache_salt=asked.cache_salt,
            counted=not is_probe(asked.rid),
        )

    def row(self) -> DigestRow:
        handle = self.ready.handle if self.ready else None
        return DigestRow(
            self.asked.rid,
            self.asked.pa,
            self.state,
            (self.computed,),
            handle_id=handle.id if handle else "",
            token=handle.token if handle else "",
        )


class Handles:
    """Turns computed prompts, and whole blocks of those that are still computed, into handles held under a lease.

    `early_s` is the lease of blocks whose job goes on: the job itself holds them, so time does not end it.
    """

    def __init__(
        self,
        identity: Identity,
        leases: LeaseTable,
        ttl_s: float,
        new_token: Callable[[], str],
        early_s: float = inf,
    ) -> None:
        self._identity = identity
        self._leases = leases
        self._ttl_s = ttl_s
        self._new_token = new_token
        self._early_s = early_s
        self._made = 0

    def early(self, job: Job, progress: door.Progress, now: float) -> KvReady:
        """Hold the blocks that have become full, too; the message that names these alone."""
        tokens = progress.tokens // self._identity.block_tokens * self._identity.block_tokens
        first = tokens // self._identity.block_tokens - len(progress.groups[0].blocks)
        groups = _joined(job.handle.groups if job.handle else (), first, progress.groups)
        handle = self._held(job, groups, tokens, progress.chain_hash, self._early_s, now)
        return KvReady(
            handle=replace(handle, groups=progress.groups),
            tokens_ready=tokens,
            final=False,
            index=0,
            first_ids=(),
            logprobs=(),
            cached_tokens=0,
            durations=PrefillDurations(0.0, 0.0),
            trace=job.asked.trace,
        )

    def _held(
        self, job: Job, groups: tuple[GroupBlocks, ...], tokens: int, chain_hash: str, ttl_s: float, now: float
    ) -> KvHandle:
        """The job's handle, its lease granted or extended to `groups`."""
        if job.handle is None:
            job.handle = self._new(job)
            self._leases.grant(job.handle.id, job.key, job.handle.token, groups, ttl_s, now)
        else:
            self._leases.extend(job.handle.id, groups, ttl_s, now)
        job.handle = replace(job.handle, groups=groups, kv_tokens=tokens, chain_hash=chain_hash)
        return job.handle

    def _new(self, job: Job) -> KvHandle:
        mine = self._identity
        self._made += 1
        return KvHandle(
            id=f"{mine.incarnation:x}-{self._made}",
            rid=job.asked.rid,
            pa=job.asked.pa,
            owner=mine.name,
            incarnation=mine.incarnation,
            fingerprint=mine.fingerprint,
            kv_tokens=0,
            groups=(),
            chain_hash="",
            token=self._new_token(),
            ttl_s=self._ttl_s,
            addresses=mine.addresses,
        )

    def hold(self, job: Job, done: door.Prefilled, now: float) -> KvReady:
        """Hold all blocks of `done` from now on by time; the message that names them."""
        return KvReady(
            handle=self._held(job, done.groups, done.kv_tokens, done.chain_hash, self._ttl_s, now),
            tokens_ready=done.kv_tokens,
            final=True,
            index=done.index,
            first_ids=done.first_ids,
            logprobs=done.logprobs,
            cached_tokens=done.cached_tokens,
            durations=PrefillDurations(done.queue_s, done.prefill_s),
            finishes=tuple(int(finish) for finish in done.finishes),
            trace=job.asked.trace,
        )

    def holds(self, handle: KvHandle) -> bool:
        """Whether its lease still lives."""
        return self._leases.lookup(handle.id, handle.token) is not None


def held_by(handle: KvHandle | None) -> int:
    """Blocks that a handle names."""
    return sum(len(group.blocks) for group in handle.groups) if handle else 0


def _joined(known: tuple[GroupBlocks, ...], first: int, more: tuple[GroupBlocks, ...]) -> tuple[GroupBlocks, ...]:
    """`more` behind the first `first` blocks of each group."""
    if not first:
        return more
    return tuple(
        GroupBlocks(old.group, old.blocks[:first] + new.blocks, old.generations[:first] + new.generations)
        for old, new in zip(known, more, strict=True)
    )
