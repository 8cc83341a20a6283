"""Mock workers over a real NATS: one prefill, some decodes, no engine. `python mock_workers.py NATS CLUSTER STEP_MS DECODES`.

They say what the protocol wants said of a request that goes well, a frame a step and router, and digests; tokens are random.
Only what a router costs can be measured with them.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from splitserve.bus.bus import Bus
from splitserve.protocol.handle import GroupBlocks, KvHandle
from splitserve.protocol.messages import (
    Accepted,
    Beat,
    Cancel,
    DecodeDurations,
    DecodeJob,
    FirstRow,
    KvLoaded,
    KvReady,
    Message,
    Ping,
    Pong,
    PrefillDurations,
    PrefillJob,
    TokenFrame,
    TokenRow,
)
from splitserve.protocol.states import FinishReason
from splitserve.protocol.subjects import Subjects

BEAT_S = 0.5
PREFILL_S = 0.005
BLOCKS = GroupBlocks(0, tuple(range(13)), (0,) * 13)


@dataclass(slots=True)
class Answer:
    """One sequence: the `index` of its next token, whether its KV is here, whether its first row is still to be sent."""

    job: DecodeJob
    index: int
    running: bool
    first: bool = True


class MockWorkers:
    """All in one process, so that they cost one connection."""

    def __init__(self, bus: Bus, subjects: Subjects, decodes: int) -> None:
        self._bus, self._subjects = bus, subjects
        self._answers: dict[str, dict[str, Answer]] = {f"decode-{n}": {} for n in range(decodes)}
        self._sent: dict[tuple[str, str], int] = {}  # frames, by worker and router
        self._random = random.Random(1)
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, step_s: float) -> None:
        """Serve until cancelled."""
        await self._bus.subscribe(self._subjects.worker_in("prefill-0"), self._prefill)
        for name in self._answers:
            await self._bus.subscribe(self._subjects.worker_in(name), self._decode(name))
            await self._bus.subscribe(self._subjects.worker_kv(name), self._loaded(name))
        async with asyncio.TaskGroup() as group:
            group.create_task(self._beat())
            group.create_task(self._steps(step_s))

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            sys.exit(f"a mock worker failed: {error}")

    def _token(self) -> int:
        return self._random.randrange(300, 30_000)

    async def _beat(self) -> None:
        while True:
            for name in ("prefill-0", *self._answers):
                role = name.partition("-")[0]
                beat = Beat(
                    name, role, 1, "mock", "f", (("model", "mock"),), 16, 8192, 100_000, 100_000, bytes_per_token=1000
                )
                await self._bus.publish(self._subjects.beat(role, name), beat)
            await asyncio.sleep(BEAT_S)

    def _prefill(self, message: Message, reply_to: str | None) -> None:
        if isinstance(message, PrefillJob) and reply_to:
            self._do(self._bus.answer(reply_to, Accepted()))
            self._do(self._ready(message))
        elif isinstance(message, Ping) and reply_to:
            self._do(self._bus.answer(reply_to, Pong(1)))

    async def _ready(self, job: PrefillJob) -> None:
        await asyncio.sleep(PREFILL_S)
        handle = KvHandle(
            f"h-{job.rid}", job.rid, job.pa, "prefill-0", 1, "f", len(job.ids), (BLOCKS,), "", "t", 15.0, ()
        )
        first = tuple(self._token() for _ in job.seeds)
        index = len(job.ids) - job.prompt_len
        ready = KvReady(handle, len(job.ids), True, index, first, (), 0, PrefillDurations(0.001, 0.004))
        for subject in job.notify:
            await self._bus.publish(subject, ready)

    def _decode(self, name: str) -> Callable[[Message, str | None], None]:
        def receive(message: Message, reply_to: str | None) -> None:
            if isinstance(message, DecodeJob) and reply_to:
                self._answers[name][message.rid] = Answer(message, len(message.outputs[0]), message.source is None)
                self._do(self._bus.answer(reply_to, Accepted()))
            elif isinstance(message, Ping) and reply_to:
                self._do(self._bus.answer(reply_to, Pong(1)))
            elif isinstance(message, Cancel):
                self._answers[name].pop(message.rid, None)

        return receive

    def _loaded(self, name: str) -> Callable[[Message, str | None], None]:
        def receive(message: Message, _: str | None) -> None:
            if not isinstance(message, KvReady):
                return
            answer = self._answers[name].get(message.handle.rid)
            if answer is not None and not answer.running:
                answer.running, answer.index, job = True, message.index + 1, answer.job
                loaded = KvLoaded(job.rid, name, job.da, job.pa, 1000, 13, 0, "shm", 0.0005, 0.001)
                self._do(self._bus.publish(self._subjects.router_events(job.router), loaded))

        return receive

    async def _steps(self, step_s: float) -> None:
        while True:
            await asyncio.sleep(step_s)
            for name, answers in self._answers.items():
                frames: dict[str, list[TokenRow]] = {}
                for rid, answer in list(answers.items()):
                    if answer.running:
                        row = self._row(answer)
                        frames.setdefault(answer.job.router, []).append(row)
                        if row.finish:
                            del answers[rid]
                for router, rows in frames.items():
                    seq = self._sent[name, router] = self._sent.get((name, router), 0) + 1
                    await self._bus.publish(self._subjects.router_events(router), TokenFrame.of(name, 1, seq, rows))

    def _row(self, answer: Answer) -> TokenRow:
        job, index = answer.job, answer.index
        last = index + 1 >= job.params.max_tokens
        first = FirstRow(0, 0, DecodeDurations(0.001, 0.0, 0.002)) if answer.first else None
        answer.index, answer.first = index + 1, False
        finish = FinishReason.LENGTH if last else FinishReason.RUNNING
        return TokenRow(job.slot, job.da, index, (self._token(),), finish, first)


async def main() -> None:
    nats, cluster, step_ms, decodes = sys.argv[1:]
    bus = await Bus.connect(nats, name="mock", role="decode", connect_timeout_s=10)
    await MockWorkers(bus, Subjects(cluster), int(decodes)).run(float(step_ms) / 1000)


if __name__ == "__main__":
    asyncio.run(main())
