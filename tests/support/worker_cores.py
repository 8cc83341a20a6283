"""Messages for worker cores, and a driver that keeps the time and picks commands apart. No engine, no bus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from splitserve.decode.jobs import DecodeJobs
from splitserve.decode.matching import chain_hashes, proof
from splitserve.engine import door
from splitserve.prefill.jobs import PrefillJobs
from splitserve.protocol.effects import Answer, Publish, Received, Tick
from splitserve.protocol.handle import GroupBlocks, KvAddress, KvHandle, KvSource
from splitserve.protocol.messages import (
    Accepted,
    Amend,
    Beat,
    DecodeJob,
    KvReady,
    Message,
    PrefillDurations,
    PrefillJob,
    Refused,
    TokenFrame,
    TokenRow,
)
from splitserve.protocol.params import SamplingParams
from splitserve.protocol.states import FinishReason, Role
from splitserve.protocol.subjects import Subjects
from splitserve.worker.effects import EngineBatch, Identity, ToEngine

T = TypeVar("T")
BLOCK = 4
FINGERPRINT = "f1"
FACTORS = (("protocol", "1"), ("dtype", "float32"))
SUBJECTS = Subjects("test")
R1, R2 = SUBJECTS.router_events("r1"), SUBJECTS.router_events("r2")
PROMPT = tuple(range(10))


def identity(name: str = "w", *, incarnation: int = 7, blocks: int = 100, max_model_len: int = 256) -> Identity:
    return Identity(
        name=name,
        incarnation=incarnation,
        model="toy",
        fingerprint=FINGERPRINT,
        fingerprint_factors=FACTORS,
        block_tokens=BLOCK,
        total_blocks=blocks,
        max_model_len=max_model_len,
        chunk_tokens=16,
        bytes_per_token=1,
        addresses=(KvAddress("shm", f"/run/{name}", "host"),),
    )


def source(worker: str = "p", incarnation: int = 3) -> KvSource:
    return KvSource(worker, incarnation, (KvAddress("shm", f"/run/{worker}", "host"),))


def prefill_job(rid: str = "a", pa: int = 1, **changes: Any) -> PrefillJob:
    fields: dict[str, Any] = {
        "router": "r1",
        "incarnation": 7,
        "ids": PROMPT,
        "prompt_len": len(PROMPT),
        "params": SamplingParams(max_tokens=8),
        "seeds": (1,),
        "notify": (R1, SUBJECTS.worker_kv("d")),
        "fingerprint": FINGERPRINT,
        "ttl_s": 600.0,
    }
    return PrefillJob(rid=rid, pa=pa, **(fields | changes))


def decode_job(rid: str = "a", da: int = 1, **changes: Any) -> DecodeJob:
    fields: dict[str, Any] = {
        "router": "r1",
        "incarnation": 7,
        "slot": 0,
        "pa": 1,
        "source": source(),
        "ids": PROMPT,
        "outputs": ((),),
        "params": SamplingParams(max_tokens=8),
        "seeds": (1,),
        "fingerprint": FINGERPRINT,
        "ttl_s": 600.0,
    }
    return DecodeJob(rid=rid, da=da, **(fields | changes))


def amend(rid: str = "a", da: int = 2, **changes: Any) -> Amend:
    fields: dict[str, Any] = {
        "router": "r1",
        "incarnation": 7,
        "pa": 2,
        "source": source(),
        "outputs": ((),),
        "ttl_s": 600.0,
    }
    return Amend(rid=rid, da=da, **(fields | changes))


def handle(rid: str = "a", pa: int = 1, ids: Sequence[int] = PROMPT, **changes: Any) -> KvHandle:
    blocks = -(-len(ids) // BLOCK)
    fields: dict[str, Any] = {
        "id": f"h-{rid}-{pa}",
        "owner": "p",
        "incarnation": 3,
        "fingerprint": FINGERPRINT,
        "kv_tokens": len(ids),
        "groups": (GroupBlocks(0, tuple(range(50, 50 + blocks)), tuple(range(900, 900 + blocks))),),
        "chain_hash": proof(chain_hashes(ids, BLOCK, FINGERPRINT, ""), len(ids) // BLOCK),
        "token": "0" * 32,
        "ttl_s": 15.0,
        "addresses": (),
    }
    return KvHandle(rid=rid, pa=pa, **(fields | changes))


def kv_ready(rid: str = "a", pa: int = 1, ids: Sequence[int] = PROMPT, **changes: Any) -> KvReady:
    fields: dict[str, Any] = {
        "handle": handle(rid, pa, ids),
        "tokens_ready": len(ids),
        "final": True,
        "index": len(ids) - len(PROMPT),
        "first_ids": (77,),
        "logprobs": (),
        "cached_tokens": 0,
        "durations": PrefillDurations(0.0, 0.0),
        "finishes": (int(FinishReason.RUNNING),),
    }
    return KvReady(**(fields | changes))


def prefilled(rid: str = "a", pa: int = 1, tokens: int = len(PROMPT)) -> door.Prefilled:
    blocks = -(-tokens // BLOCK)
    return door.Prefilled(
        key=(rid, pa),
        groups=(GroupBlocks(0, tuple(range(blocks)), (1,) * blocks),),
        kv_tokens=tokens,
        chain_hash="c0",
        index=0,
        first_ids=(77,),
        finishes=(FinishReason.RUNNING,),
        logprobs=(),
        cached_tokens=0,
        queue_s=0.1,
        prefill_s=0.2,
    )


def reserved(rid: str = "a", da: int = 1, blocks: int = 3, cached: int = 0) -> door.Reserved:
    return door.Reserved((rid, da), (tuple(range(10, 10 + blocks)),), cached, cached * BLOCK)


def token(
    rid: str, da: int, index: int, ids: tuple[int, ...], finish: FinishReason = FinishReason.RUNNING, sequence: int = 0
) -> door.TokenEvent:
    return door.TokenEvent((rid, da), sequence, index, ids, finish)


class Driver:
    """One core, its clock, and the commands of the last event."""

    def __init__(self, core: PrefillJobs | DecodeJobs) -> None:
        self.core = core
        self.now = 100.0
        self.commands: list[Any] = []
        self._pool = door.PoolStats(100, 100, 0, 0, 0)

    def event(self, event: object) -> list[Any]:
        self.commands = list[Any](self.core.handle(event, self.now))
        return self.commands

    def say(self, message: Message) -> Message | None:
        """Deliver a message; its answer, if the core gave one."""
        self.event(Received(message, "reply"))
        answers = self.of(Answer)
        assert len(answers) <= 1
        return answers[0].message if answers else None

    def engine(self, *events: door.Event) -> list[Any]:
        return self.event(EngineBatch(door.Batch(events, None, self._pool, 0)))

    def after(self, seconds: float) -> list[Any]:
        self.now += seconds
        return self.event(Tick())

    def beats(self, seconds: float, *names: str, own: bool = True) -> list[Any]:
        """Let time pass while beats of routers `names`, and our own, come every half second; all commands."""
        commands: list[Any] = []
        for _ in range(round(seconds * 2)):
            self.now += 0.5
            if own:
                commands += self.event(Received(self.core.beat(self.now)))
            for name in names:
                commands += self.event(Received(Beat(f"stable name of {name}", Role.ROUTER, 1, life=name)))
            commands += self.event(Tick())
        self.commands = commands
        return commands

    # --- the last commands ---

    def of(self, kind: type[T]) -> list[T]:
        return [command for command in self.commands if isinstance(command, kind)]

    def to_engine(self, kind: type[T]) -> list[T]:
        return [c.command for c in self.of(ToEngine) if isinstance(c.command, kind)]

    def published(self, kind: type[T], subject: str | None = None) -> list[T]:
        return [
            c.message
            for c in self.of(Publish)
            if isinstance(c.message, kind) and (subject is None or c.subject == subject)
        ]

    def rows(self, subject: str = R1) -> list[TokenRow]:
        return [row for frame in self.published(TokenFrame, subject) for row in frame.rows()]


def accepted(answer: Message | None) -> Accepted:
    assert isinstance(answer, Accepted), answer
    return answer


def refused(answer: Message | None) -> Refused:
    assert isinstance(answer, Refused), answer
    return answer
