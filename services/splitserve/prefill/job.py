"""One job of a prefill worker, and the handle that its blocks are held under."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from splitserve.engine import door
from splitserve.kv.lease import LeaseTable
from splitserve.protocol.handle import KvHandle
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
    ready: KvReady | None = None

    @property
    def key(self) -> Key:
        return (self.asked.rid, self.asked.pa)

    @property
    def tokens_left(self) -> int:
        return 0 if self.state is PrefillState.HELD else len(self.asked.ids) - self.computed

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
    """Turns computed prompts into handles, each held under a lease."""

    def __init__(self, identity: Identity, leases: LeaseTable, ttl_s: float, new_token: Callable[[], str]) -> None:
        self._identity = identity
        self._leases = leases
        self._ttl_s = ttl_s
        self._new_token = new_token
        self._made = 0

    def hold(self, job: Job, done: door.Prefilled, now: float) -> KvReady:
        """Grant a lease on the blocks of `done`; the message that names them."""
        mine = self._identity
        self._made += 1
        handle = KvHandle(
            id=f"{mine.incarnation:x}-{self._made}",
            rid=job.asked.rid,
            pa=job.asked.pa,
            owner=mine.name,
            incarnation=mine.incarnation,
            fingerprint=mine.fingerprint,
            kv_tokens=done.kv_tokens,
            groups=done.groups,
            chain_hash=done.chain_hash,
            token=self._new_token(),
            ttl_s=self._ttl_s,
            addresses=mine.addresses,
        )
        self._leases.grant(handle.id, job.key, handle.token, handle.groups, handle.ttl_s, now)
        return KvReady(
            handle=handle,
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

    def holds(self, ready: KvReady) -> bool:
        """Whether its lease still lives."""
        return self._leases.lookup(ready.handle.id, ready.handle.token) is not None
