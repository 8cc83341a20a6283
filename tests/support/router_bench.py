"""A router's core on a bench: the test plays bus, clock and workers by hand."""

from __future__ import annotations

from typing import Any, TypeVar

from splitserve.config import RoutingSettings
from splitserve.errors import SplitserveError
from splitserve.protocol.effects import Answered, Ask, NoAnswer, Publish, Received, Tick, Unanswered
from splitserve.protocol.handle import GroupBlocks, KvHandle
from splitserve.protocol.messages import (
    Accepted,
    Amend,
    Beat,
    DecodeDurations,
    DecodeJob,
    Digest,
    DigestRow,
    FirstRow,
    KvFailed,
    KvLoaded,
    KvReady,
    Message,
    PrefillDurations,
    PrefillJob,
    Refused,
    TokenFrame,
    TokenRow,
)
from splitserve.protocol.params import SamplingParams
from splitserve.protocol.states import FailReason, FinishReason, RefuseReason, RequestState
from splitserve.protocol.subjects import Subjects
from splitserve.router.core import RouterCore
from splitserve.router.effects import Crashed, Deliver, Leave, RouterCommand, RouterEvent, Save, Stop, Submit
from splitserve.router.generation import Done, Submission, Tokens
from splitserve.router.records import Record
from splitserve.router.rules import Rules

M = TypeVar("M", bound=Message)
SUBJECTS = Subjects("test")


def worker_beat(name: str, role: str, incarnation: int = 1, **changes: Any) -> Beat:
    fields: dict[str, Any] = {
        "model": "m",
        "fingerprint": "f",
        "fingerprint_factors": (("model", "m"),),
        "block_tokens": 16,
        "total_blocks": 1000,
        "chunk_tokens": 64,
        "bytes_per_token": 1000,
    }
    return Beat(name, role, incarnation, **(fields | changes))


class Bench:
    """`out` collects every command; what was taken by `ask`, `published` is marked off."""

    def __init__(
        self, *, split: str = "always", rules: Rules | None = None, prefills: int = 1, decodes: int = 2
    ) -> None:
        self.now = 100.0
        self.core = RouterCore(
            router="r-life",
            name="router-0",
            incarnation=7,
            subjects=SUBJECTS,
            settings=RoutingSettings.model_validate({"split": split}),
            rules=rules,
        )
        self.asks: list[Ask] = []
        self.publishes: list[Publish] = []
        self.delivered: list[Deliver] = []
        self.records: list[Record] = []
        self.frames: dict[str, int] = {}
        self.workers = [(f"p{i}", "prefill") for i in range(prefills)] + [(f"d{i}", "decode") for i in range(decodes)]
        self.mute: set[str] = set()
        self.beats()

    # --- events in ---

    def send(self, event: RouterEvent) -> None:
        for command in self.core.handle(event, self.now):
            self._keep(command)

    def _keep(self, command: RouterCommand) -> None:
        if isinstance(command, Crashed):
            raise command.error
        if isinstance(command, Ask):
            self.asks.append(command)
        elif isinstance(command, Publish):
            self.publishes.append(command)
        elif isinstance(command, Deliver):
            self.delivered.append(command)
        else:
            assert isinstance(command, Save)
            self.records.append(command.record)

    def receive(self, message: Message) -> None:
        self.send(Received(message))

    def beats(self) -> None:
        self.receive(self.core.beat(self.now))
        for name, role in self.workers:
            if name not in self.mute:
                self.receive(worker_beat(name, role))

    def tick(self) -> None:
        self.send(Tick())

    def run(self, seconds: float, *, beats: bool = True, step: float = 0.05) -> None:
        """Let time pass; everybody but the mute beats, pings of theirs are answered."""
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now = min(end, self.now + step)
            if beats:
                self.beats()
            self.tick()

    def submit(self, rid: str = "a", *, ids: int = 10, n: int = 1, **changes: Any) -> None:
        timeout = changes.pop("timeout_s", 600.0)
        self.send(
            Submit(
                Submission(
                    rid, "m", tuple(range(ids)), SamplingParams(max_tokens=50), tuple(range(n)), timeout, **changes
                )
            )
        )

    def leave(self, rid: str = "a", error: SplitserveError | None = None) -> None:
        self.send(Leave(rid, error))

    def stop(self, choice: int = 0, rid: str = "a") -> None:
        self.send(Stop(rid, choice))

    # --- questions out, answers in ---

    def asked(self, kind: type[M]) -> list[tuple[Ask, M]]:
        """Open questions of a kind, oldest first."""
        return [(ask, ask.message) for ask in self.asks if isinstance(ask.message, kind)]

    def take(self, kind: type[M]) -> tuple[Ask, M]:
        ask, message = self.asked(kind)[0]
        self.asks.remove(ask)
        return ask, message

    def answer(self, ask: Ask, message: Message) -> None:
        self.send(Answered(ask.tag, message))

    def accept(self, kind: type[M]) -> M:
        ask, message = self.take(kind)
        self.answer(ask, Accepted())
        return message

    def refuse(self, kind: type[M], reason: RefuseReason = RefuseReason.FULL) -> M:
        ask, message = self.take(kind)
        self.answer(ask, Refused(reason, f"said {reason}", 150))
        return message

    def unanswered(self, kind: type[M], why: NoAnswer = NoAnswer.TIMEOUT) -> M:
        ask, message = self.take(kind)
        self.send(Unanswered(ask.tag, why))
        return message

    def published(self, kind: type[M]) -> list[tuple[str, M]]:
        """(worker or router, message), all of a kind since the last call."""
        found = [(p.subject.split(".")[3], p.message) for p in self.publishes if isinstance(p.message, kind)]
        self.publishes = [p for p in self.publishes if not isinstance(p.message, kind)]
        return found

    # --- workers say ---

    def kv_ready(
        self, job: PrefillJob, token: int = 1000, finish: FinishReason = FinishReason.RUNNING, cached: int = 0
    ) -> KvReady:
        n = len(job.seeds)
        message = KvReady(
            handle=KvHandle(
                id=f"h-{job.rid}-{job.pa}",
                rid=job.rid,
                pa=job.pa,
                owner="p0",
                incarnation=1,
                fingerprint="f",
                kv_tokens=len(job.ids),
                groups=(GroupBlocks(0, (1,), (1,)),),
                chain_hash="",
                token="secret",
                ttl_s=15.0,
                addresses=(),
            ),
            tokens_ready=len(job.ids),
            final=True,
            index=len(job.ids) - job.prompt_len,
            first_ids=tuple(token + i for i in range(n)),
            logprobs=(),
            cached_tokens=cached,
            durations=PrefillDurations(0.01, 0.02),
            finishes=(int(finish),) * n,
        )
        self.receive(message)
        return message

    def kv_loaded(self, job: DecodeJob | Amend, worker: str = "d0") -> None:
        self.receive(KvLoaded(job.rid, worker, job.da, job.pa, 1000, 1, 0, "shm", 0.001, 0.002))

    def kv_failed(self, job: DecodeJob | Amend, worker: str = "d0", reason: FailReason = FailReason.FENCED) -> None:
        self.receive(KvFailed(job.rid, worker, job.da, job.pa, reason, "no"))

    def row(
        self,
        slot: int,
        da: int,
        first_index: int,
        *ids: int,
        finish: FinishReason = FinishReason.RUNNING,
        worker: str = "d0",
        first: bool = False,
        skip: int = 0,
    ) -> None:
        """One frame of one row; `skip`: frames that were lost before it."""
        seq = self.frames[worker] = self.frames.get(worker, 0) + 1 + skip
        mark = FirstRow(0, 4, DecodeDurations(0.001, 0.03, 0.002)) if first else None
        self.receive(TokenFrame.of(worker, 1, seq, [TokenRow(slot, da, first_index, ids, finish, mark)]))

    def digest(self, worker: str, *rows: DigestRow, role: str = "decode") -> None:
        self.receive(Digest(worker, role, 1, self.frames.get(worker, 0), rows))

    # --- what the client saw ---

    def tokens(self, rid: str = "a", choice: int = 0) -> list[int]:
        return [
            token
            for d in self.delivered
            if d.rid == rid and isinstance(d.event, Tokens) and d.event.choice == choice
            for token in d.event.ids
        ]

    def done(self, rid: str = "a") -> Done | None:
        found = [d.event for d in self.delivered if d.rid == rid and isinstance(d.event, Done)]
        assert len(found) <= 1, "one terminal event a request"
        return found[0] if found else None

    def error(self, rid: str = "a") -> str:
        done = self.done(rid)
        return type(done.error).__name__ if done and done.error else ""

    def state(self, rid: str = "a") -> RequestState:
        return next(r.state for r in reversed(self.records) if r.rid == rid)

    # --- common starts ---

    def reserved(self, **changes: Any) -> DecodeJob:
        self.submit(**changes)
        return self.accept(DecodeJob)

    def prefilling(self, **changes: Any) -> tuple[DecodeJob, PrefillJob]:
        decode = self.reserved(**changes)
        return decode, self.accept(PrefillJob)

    def transferring(self, **changes: Any) -> tuple[DecodeJob, PrefillJob]:
        decode, prefill = self.prefilling(**changes)
        self.kv_ready(prefill)
        return decode, prefill

    def decoding(self, **changes: Any) -> DecodeJob:
        decode, _ = self.transferring(**changes)
        self.kv_loaded(decode)
        return decode
