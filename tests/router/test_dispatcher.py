"""The dispatcher on a real bus, with decode workers that are a few lines of this file."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from splitserve.bus.bus import Bus
from splitserve.config import RoutingSettings
from splitserve.errors import BusUnavailable, MessageTooLarge, NoWorkers, Overloaded, row_of
from splitserve.protocol.messages import Accepted, Cancel, DecodeJob, FinAck, Message, Pong, TokenFrame, TokenRow
from splitserve.protocol.params import SamplingParams
from splitserve.protocol.states import FinishReason, RequestState
from splitserve.protocol.subjects import Subjects
from splitserve.protocol.trace import NO_TRACE, TraceContext, new_trace
from splitserve.router.core import RouterCore
from splitserve.router.dispatcher import Dispatcher
from splitserve.router.generation import Done, Finished, GenerationEvent, Submission, Tokens
from splitserve.router.lifecycle import Lifecycle
from splitserve.router.records import Record, shown
from support.router_bench import worker_beat
from support.servers import Server, nats
from support.waiting import until

COUNT = 5


class LittleWorker:
    """Accepts local decode jobs and answers each with 0 … COUNT-1, a frame a token; `held` waits before the first."""

    def __init__(self, bus: Bus, subjects: Subjects, name: str) -> None:
        self.name = name
        self.heard: list[Message] = []
        self.held = asyncio.Event()
        self.held.set()
        self.bus = bus
        self._subjects = subjects
        self._seqs: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    @asynccontextmanager
    async def on(cls, url: str, subjects: Subjects, name: str) -> AsyncGenerator[LittleWorker]:
        bus = await Bus.connect(url, name=name, role="decode", connect_timeout_s=10)
        worker = cls(bus, subjects, name)
        await bus.subscribe(subjects.worker_in(name), worker._receive)
        worker._do(worker._beat())
        try:
            yield worker
        finally:
            for task in worker._tasks:
                task.cancel()
            await asyncio.gather(*worker._tasks, return_exceptions=True)
            await bus.close()

    def all(self, kind: type[Message]) -> list[Message]:
        return [m for m in self.heard if isinstance(m, kind)]

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(asyncio.create_task(work))

    async def _beat(self) -> None:
        while True:
            with suppress(BusUnavailable):
                await self.bus.publish(self._subjects.beat("decode", self.name), worker_beat(self.name, "decode"))
            await asyncio.sleep(0.1)

    def _receive(self, message: Message, reply_to: str | None) -> None:
        self.heard.append(message)
        if reply_to is None:
            return
        if isinstance(message, DecodeJob):
            self._do(self._serve(message, reply_to))
        else:
            self._do(self.bus.answer(reply_to, Pong(1)))

    async def _serve(self, job: DecodeJob, reply_to: str) -> None:
        await self.bus.answer(reply_to, Accepted())
        await self.held.wait()
        for index in range(len(job.outputs[0]), COUNT):
            seq = self._seqs[job.router] = self._seqs.get(job.router, 0) + 1
            finish = FinishReason.LENGTH if index == COUNT - 1 else FinishReason.RUNNING
            row = TokenRow(job.slot, job.da, index, (index,), finish)
            frame = TokenFrame.of(self.name, 1, seq, [row])
            await self.bus.publish(self._subjects.router_events(job.router), frame)


class Stage:
    def __init__(self, dispatcher: Dispatcher, core: RouterCore, records: list[Record], subjects: Subjects) -> None:
        self.dispatcher = dispatcher
        self.core = core
        self.records = records
        self.subjects = subjects

    async def knows(self, *names: str) -> None:
        await until(lambda: {w.beat.name for w in self.core.fleet if w.usable} >= set(names), f"beats of {names}")

    async def accepted(self) -> None:
        """Until the last request was accepted by the decode worker that reads its prompt, too."""
        await until(lambda: [r.state for r in self.records[-1:]] == [RequestState.PREFILLING], "acceptance")


@asynccontextmanager
async def router(url: str, **settings: object) -> AsyncGenerator[Stage]:
    """A dispatcher in a cluster of its own."""
    subjects = Subjects(f"t-{secrets.token_hex(4)}")
    core = RouterCore(
        router="life",
        name="router-0",
        incarnation=9,
        subjects=subjects,
        settings=RoutingSettings.model_validate({"split": "never", **settings}),
    )
    records: list[Record] = []
    dispatcher = await Dispatcher.open(
        core,
        nats=url,
        subjects=subjects,
        life="life",
        connect_timeout_s=10,
        save=records.append,
        page=lambda: b"",
    )
    try:
        yield Stage(dispatcher, core, records, subjects)
    finally:
        await dispatcher.close()


def submission(rid: str = "a", *, ids: int = 3, timeout_s: float = 30.0, trace: TraceContext = NO_TRACE) -> Submission:
    return Submission(rid, "m", tuple(range(ids)), SamplingParams(max_tokens=COUNT), (0,), timeout_s, trace=trace)


async def run(stage: Stage, sub: Submission) -> tuple[list[int], list[FinishReason], Done]:
    """A whole generation as an endpoint reads it."""
    ids: list[int] = []
    reasons: list[FinishReason] = []
    events: asyncio.Queue[GenerationEvent] = asyncio.Queue()
    async with stage.dispatcher.submit(sub, events.put_nowait):
        while True:
            match await events.get():
                case Tokens() as new:
                    assert new.first_index == len(ids)
                    ids += new.ids
                case Finished(_, reason):
                    reasons.append(reason)
                case Done() as done:
                    return ids, reasons, done


def nobody(event: GenerationEvent) -> None:
    """Hears what no test asks for."""


async def test_a_request_runs_over_the_bus_and_its_slot_is_acknowledged(shared_nats: Server) -> None:
    async with router(shared_nats.url) as stage, LittleWorker.on(shared_nats.url, stage.subjects, "d0") as worker:
        await stage.knows("d0")
        ids, reasons, done = await run(stage, submission())
        assert (ids, reasons, done.error) == (list(range(COUNT)), [FinishReason.LENGTH], None)
        assert stage.records[-1].state is RequestState.FINISHED
        assert stage.dispatcher.record("a") is None
        await until(lambda: bool(worker.all(FinAck)), "a FinAck")


async def test_many_requests_at_once_keep_their_tokens_apart(shared_nats: Server) -> None:
    async with (
        router(shared_nats.url) as stage,
        LittleWorker.on(shared_nats.url, stage.subjects, "d0"),
        LittleWorker.on(shared_nats.url, stage.subjects, "d1"),
    ):
        await stage.knows("d0", "d1")
        answers = await asyncio.gather(*(run(stage, submission(f"r{i}")) for i in range(60)))
        assert all(ids == list(range(COUNT)) and done.error is None for ids, _, done in answers)
        await until(lambda: stage.core.held["timers"] == 0, "the end of every timer")
        assert stage.core.held == {"lives": 0, "slots": 0, "timers": 0}


async def test_without_a_worker_submit_refuses_before_anything_is_sent(shared_nats: Server) -> None:
    async with router(shared_nats.url) as stage:
        with pytest.raises(NoWorkers, match="no decode worker serves 'm'"):
            stage.dispatcher.submit(submission(), nobody)


async def test_a_full_queue_refuses_with_a_time_to_come_back(shared_nats: Server) -> None:
    async with (
        router(shared_nats.url, max_waiting_requests=1) as stage,
        LittleWorker.on(shared_nats.url, stage.subjects, "d0") as worker,
        AsyncExitStack() as clients,
    ):
        await stage.knows("d0")
        worker.held.clear()
        await clients.enter_async_context(stage.dispatcher.submit(submission("fills the pool", ids=10_000), nobody))
        await stage.accepted()
        await clients.enter_async_context(stage.dispatcher.submit(submission("waits", ids=10_000), nobody))
        await until(lambda: stage.core.waiting.requests == 1, "one that waits")
        with pytest.raises(Overloaded) as caught:
            stage.dispatcher.submit(submission("third"), nobody)
        assert caught.value.retry_after_s


async def test_leaving_cancels_the_work(shared_nats: Server) -> None:
    async with router(shared_nats.url) as stage, LittleWorker.on(shared_nats.url, stage.subjects, "d0") as worker:
        await stage.knows("d0")
        worker.held.clear()
        async with stage.dispatcher.submit(submission(), nobody):
            await until(lambda: bool(worker.all(DecodeJob)), "the job")
            await stage.accepted()
        await until(lambda: bool(worker.all(Cancel)), "a Cancel")
        assert stage.records[-1].state is RequestState.CANCELLED
        assert stage.core.idle


async def test_a_stopped_answer_ends_like_a_finish(shared_nats: Server) -> None:
    async with router(shared_nats.url) as stage, LittleWorker.on(shared_nats.url, stage.subjects, "d0") as worker:
        await stage.knows("d0")
        worker.held.clear()
        events: list[GenerationEvent] = []
        async with stage.dispatcher.submit(submission(), events.append) as generation:
            await stage.accepted()
            generation.stop(0)
            await until(lambda: len(events) == 2, "its end")
        first, last = events
        assert first == Finished(0, FinishReason.STOP)
        assert isinstance(last, Done)
        assert last.error is None
        await until(lambda: bool(worker.all(Cancel)), "a Cancel")


async def test_a_worker_that_is_gone_costs_a_pause_and_no_token(shared_nats: Server) -> None:
    async with router(shared_nats.url) as stage:
        async with LittleWorker.on(shared_nats.url, stage.subjects, "d0") as first:
            await stage.knows("d0")
            first.held.clear()
            running = asyncio.create_task(run(stage, submission()))
            await until(lambda: bool(first.all(DecodeJob)), "the job at the first worker")
        async with LittleWorker.on(shared_nats.url, stage.subjects, "d1"):
            ids, _, done = await running
        assert (ids, done.error) == (list(range(COUNT)), None)
        assert stage.records[-1].losses == 1


async def test_a_worker_that_never_answers_does_not_hold_a_request_for_ever(shared_nats: Server) -> None:
    async with router(shared_nats.url) as stage, LittleWorker.on(shared_nats.url, stage.subjects, "d0") as worker:
        await stage.knows("d0")
        worker.held.clear()
        _, _, done = await run(stage, submission(timeout_s=0.5))
        assert type(done.error).__name__ == "DeadlineExceeded"


def _bus_is_away(stage: Stage) -> bool:
    """A new request is refused for the bus; one that would be admitted is not started."""
    try:
        stage.dispatcher.submit(submission("b"), nobody)
    except BusUnavailable:
        return True
    return False


async def test_an_outage_of_the_bus_costs_a_pause_and_no_token(own_nats: Server) -> None:
    own_nats.start()
    async with router(own_nats.url) as stage, LittleWorker.on(own_nats.url, stage.subjects, "d0") as worker:
        await stage.knows("d0")
        worker.held.clear()
        running = asyncio.create_task(run(stage, submission()))
        await stage.accepted()
        own_nats.kill()
        await until(lambda: _bus_is_away(stage), "new requests to be refused")
        own_nats.start()
        await until(lambda: stage.dispatcher.bus.connected and worker.bus.connected, "both connections again")
        back = asyncio.get_running_loop().time()  # a connection counts before the server has its subscriptions again
        await until(lambda: all(w.heard_at > back for w in stage.core.fleet), "a beat")
        worker.held.set()
        ids, _, done = await running
        assert (ids, done.error) == (list(range(COUNT)), None)


async def test_a_prompt_over_the_bus_limit_is_refused_with_413_and_both_sizes(tmp_path: Path) -> None:
    small = nats(tmp_path, max_payload=64 << 10)
    small.start()
    try:
        async with router(small.url) as stage, LittleWorker.on(small.url, stage.subjects, "d0"):
            await stage.knows("d0")
            _, _, done = await run(stage, submission(ids=20_000))
            assert isinstance(done.error, MessageTooLarge)
            assert row_of(done.error).http_status == 413
            assert re.search(r"DecodeJob of 80\d{3} bytes .* limit of 65536", done.error.message)
    finally:
        small.kill()


async def test_closing_ends_running_requests_and_cancels_their_work(shared_nats: Server) -> None:
    async with router(shared_nats.url) as stage, LittleWorker.on(shared_nats.url, stage.subjects, "d0") as worker:
        await stage.knows("d0")
        worker.held.clear()
        running = asyncio.create_task(run(stage, submission()))
        await stage.accepted()
        await stage.dispatcher.close()
        _, _, done = await running
        assert type(done.error).__name__ == "RequestFailed"
        await until(lambda: bool(worker.all(Cancel)), "a Cancel")


async def test_a_fault_of_the_core_ends_one_request_and_is_logged(
    shared_nats: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with router(shared_nats.url) as stage, LittleWorker.on(shared_nats.url, stage.subjects, "d0"):
        await stage.knows("d0")
        row = Lifecycle.row

        def faulty(self: Lifecycle, choice: int, tokens: TokenRow) -> None:
            if self.request.rid == "bad":
                raise ZeroDivisionError("told to")
            row(self, choice, tokens)

        monkeypatch.setattr(Lifecycle, "row", faulty)
        with caplog.at_level(logging.ERROR, "splitserve.router"):
            trace = new_trace()
            bad, good = await asyncio.gather(run(stage, submission("bad", trace=trace)), run(stage, submission("good")))
        assert type(bad[2].error).__name__ == "SplitserveError"
        assert good[0] == list(range(COUNT))
        logged = [record for record in caplog.records if record.message == "the core raised"]
        assert logged[0].exc_info
        assert getattr(logged[0], "rid", "") == "bad"
        assert getattr(logged[0], "trace_id", "") == trace.trace_id


async def test_a_record_tells_the_trace_that_its_request_belongs_to(shared_nats: Server) -> None:
    async with router(shared_nats.url) as stage, LittleWorker.on(shared_nats.url, stage.subjects, "d0"):
        await stage.knows("d0")
        trace = new_trace()
        await run(stage, submission(trace=trace))
        await run(stage, submission("of nobody"))
    fields = {record.rid: {**record.row().fields, "owner": record.owner} for record in stage.records}
    assert shown("a", fields["a"])["trace_id"] == trace.trace_id
    assert shown("of nobody", fields["of nobody"])["trace_id"] is None
    del fields["a"]["trace_id"]  # as a router of before wrote it
    assert shown("a", fields["a"])["trace_id"] is None
