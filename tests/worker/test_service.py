"""Worker processes as they are started, over a real bus and a real (tiny) model; the test plays the router."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from splitserve.protocol.messages import (
    Accepted,
    Beat,
    Cancel,
    Digest,
    FinAck,
    KvFailed,
    KvLoaded,
    KvReady,
    MetricsGet,
    MetricsPage,
    Ping,
    Pong,
    Refused,
    Resume,
    ResumeAnswer,
    ResumeRow,
    TokenFrame,
)
from splitserve.protocol.params import SamplingParams
from splitserve.protocol.states import FailReason, FinishReason, RefuseReason, Role
from support.leaks import connections
from support.servers import Server
from support.waiting import until
from support.worker_processes import START_S, RouterInTest, WorkerProcess, save_tiny_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

PROMPT = tuple(range(3, 40))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@dataclass
class Pair:
    """Processes `p` and `d`, and who plays their router. Requests are named by router, so that tests may share workers.

    A test that needs one of them alone starts it alone: to import what a worker needs takes seconds.
    """

    prefill: WorkerProcess
    decode: WorkerProcess
    router: RouterInTest

    @property
    def p(self) -> str:
        return self.prefill.name

    @property
    def d(self) -> str:
        return self.decode.name

    def rid(self, name: str) -> str:
        return f"{self.router.name}/{name}"

    async def reserve(self, name: str, slot: int, ids: tuple[int, ...] = PROMPT, **changes: Any) -> None:
        job = self.router.decode_job(self.d, self.rid(name), slot, ids, **changes)
        assert isinstance(await self.router.ask(self.d, job), Accepted)

    async def read(self, name: str, ids: tuple[int, ...] = PROMPT, decode: str = "nobody") -> None:
        job = self.router.prefill_job(self.p, decode, self.rid(name), ids)
        assert isinstance(await self.router.ask(self.p, job), Accepted)

    async def split(self, name: str, slot: int, ids: tuple[int, ...] = PROMPT, **changes: Any) -> None:
        """Reserve, then prefill: the main job."""
        await self.reserve(name, slot, ids, source=self.router.source(self.p), **changes)
        await self.read(name, ids, self.d)

    async def ready(self) -> None:
        await self.router.ready(self.prefill)
        await self.router.ready(self.decode)


def connected(nats: Server, *names: str) -> None:
    """Wait until these are on the bus: from then on their subscriptions are not those of a test."""
    give_up = time.monotonic() + START_S
    while missing := set(names) - {connection.get("name") for connection in connections(nats)}:
        if time.monotonic() > give_up:
            raise TimeoutError(f"not on the bus in {START_S:g} s: {sorted(missing)}")
        time.sleep(0.05)


@pytest.fixture(scope="module")
def shared_processes(shared_nats: Server, tiny_model: Path) -> Iterator[tuple[WorkerProcess, WorkerProcess]]:
    """Two workers for tests that do not hurt them."""
    prefill = WorkerProcess(Role.PREFILL, "p0", shared_nats.url, tiny_model)
    decode = WorkerProcess(Role.DECODE, "d0", shared_nats.url, tiny_model)
    connected(shared_nats, "p0", "p0-beats", "d0", "d0-beats")
    yield prefill, decode
    prefill.kill()
    decode.kill()


@pytest.fixture
async def router(shared_nats: Server) -> AsyncIterator[RouterInTest]:
    async with RouterInTest.on(shared_nats.url) as router:
        yield router


@pytest.fixture
async def shared(shared_processes: tuple[WorkerProcess, WorkerProcess], router: RouterInTest) -> Pair:
    pair = Pair(*shared_processes, router)
    await pair.ready()
    return pair


Start = Callable[..., Awaitable[Pair]]


@pytest.fixture
async def start(
    shared_nats: Server,
    router: RouterInTest,
    tiny_model: Path,
    shared_processes: tuple[WorkerProcess, WorkerProcess],
) -> AsyncIterator[Start]:
    """Two workers with the test's flags and environment, or of one role only: the other is then the shared one."""
    started: list[WorkerProcess] = []

    async def start(*flags: str, only: Role | None = None, **env: str) -> Pair:
        workers = list(shared_processes)
        for at, role in enumerate((Role.PREFILL, Role.DECODE)):
            if only in (None, role):
                workers[at] = WorkerProcess(role, f"{role}-{router.name}", shared_nats.url, tiny_model, *flags, **env)
                started.append(workers[at])
        pair = Pair(workers[0], workers[1], router)
        await pair.ready()
        return pair

    yield start
    for worker in started:
        worker.kill()


async def test_an_answer_is_prefilled_in_one_process_decoded_in_another_and_equals_a_local_one(shared: Pair) -> None:
    router = shared.router
    prompt, other = ids_of(router, 37), ids_of(router, 41)
    decode_before, prefill_before = await router.metrics(shared.d), await router.metrics(shared.p)
    await shared.reserve("alone", 0, prompt)
    await until(lambda: router.finished(0), "the local answer")
    await shared.split("same", 1, prompt)
    await shared.split("other", 2, other)
    await until(lambda: router.finished(1) and router.finished(2), "the split answers")
    ready = {message.handle.rid: message for message in router.all(KvReady)}
    loaded = {message.rid: message for message in router.all(KvLoaded)}
    assert router.tokens(0, 1) == [*ready[shared.rid("same")].first_ids, *router.tokens(1, 1)]
    assert len(router.tokens(0, 1)) == 8
    assert {message.transport for message in loaded.values()} == {"shm"}
    assert loaded[shared.rid("same")].cached_tokens == 32  # the local one left its two full blocks
    assert [loaded[shared.rid(name)].blocks for name in ("same", "other")] == [1, 3]

    decode, prefill = await router.metrics(shared.d), await router.metrics(shared.p)

    def rose(name: str) -> float:
        return decode[name] - decode_before.get(name, 0)

    assert rose("splitserve_kv_transfer_blocks_total{shm}") == 4
    assert rose("splitserve_kv_transfer_bytes_total{shm}") == sum(message.bytes for message in loaded.values())
    assert rose("splitserve_prefill_tokens_total") == 37  # of the local answer: no split prompt was computed here
    assert prefill["splitserve_prefill_tokens_total"] - prefill_before["splitserve_prefill_tokens_total"] == 37 + 41
    await router.beat_with(shared.p, _nothing_promised, "the releases")


async def test_over_tcp_the_tokens_are_the_same_and_a_dead_prefill_workers_handle_fails_by_name(start: Start) -> None:
    pair = await start("--kv-transport", "tcp")
    router = pair.router
    await pair.reserve("alone", 0)
    await until(lambda: router.finished(0), "the local answer")
    await pair.split("same", 1)
    await pair.split("other", 2, (*PROMPT[::-1], *PROMPT))
    await until(lambda: router.finished(1) and router.finished(2), "both split answers")
    ready = await router.first(KvReady, lambda ready: ready.handle.rid == pair.rid("same"))
    assert [*ready.first_ids, *router.tokens(1, 1)] == router.tokens(0, 1)
    assert {loaded.transport for loaded in router.all(KvLoaded)} == {"tcp"}
    await router.beat_with(pair.p, _nothing_promised, "the releases")

    source = router.source(pair.p)
    await pair.read("a")
    ready = await router.first(KvReady, lambda ready: ready.handle.rid == pair.rid("a"))
    pair.prefill.kill()
    await pair.reserve("a", 3, source=source)
    await router.bus.publish(router.subjects.worker_kv(pair.d), ready)
    assert (await router.first(KvFailed)).reason is FailReason.UNREACHABLE


async def test_messages_are_answered_and_fin_ack_frees_what_is_kept(shared: Pair) -> None:
    router, incarnation = shared.router, shared.router.beats[shared.d].incarnation
    assert await router.ask(shared.d, Ping(incarnation)) == Pong(incarnation)
    rid = shared.rid("a")
    job = router.decode_job(shared.d, rid, 0, PROMPT)
    first = await router.ask(shared.d, job)
    assert await router.ask(shared.d, job) == first
    await until(lambda: router.finished(0), "the answer")
    router.heard.clear()
    rows = (ResumeRow(rid, 1, 0, 3), ResumeRow("b", 1, 9, 0))
    assert await router.ask(shared.d, Resume(router.name, incarnation, rows)) == ResumeAnswer((("b", 1),))
    frame = await router.first(TokenFrame)
    assert [(row.first_index, len(row.ids), row.finish) for row in frame.rows()] == [(3, 5, FinishReason.LENGTH)]
    digest = await router.first(Digest, lambda digest: len(digest.rows) == 1)
    assert digest.rows[0].state == "done"
    await router.bus.publish(router.subjects.worker_in(shared.d), FinAck(router.name, incarnation, (0,)))
    await router.first(Digest, lambda digest: not digest.rows)
    stale = await router.ask(shared.d, Resume(router.name, 1, ()))
    assert isinstance(stale, Refused)
    assert stale.reason is RefuseReason.STALE_INCARNATION
    page = await router.bus.request(router.subjects.metrics(shared.d), MetricsGet(), 2.0)
    assert isinstance(page, MetricsPage)
    assert 'vllm:num_requests_running{engine="d0"' in page.text


async def test_a_cancel_at_each_stage_leaves_no_block_in_use(shared: Pair) -> None:
    router = shared.router
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    await shared.split("fetched", 0, params=params)
    await shared.reserve("reserved", 1, source=router.source(shared.p))
    await shared.read("held", PROMPT[::-1])
    await router.first(KvLoaded)
    await router.first(KvReady, lambda ready: ready.handle.rid == shared.rid("held"))
    for worker in (shared.p, shared.d):
        for name in ("fetched", "reserved", "held"):
            cancel = Cancel(shared.rid(name), router.beats[worker].incarnation, 1, 1, "test")
            await router.bus.publish(router.subjects.worker_in(worker), cancel)
        await router.beat_with(worker, _all_free, f"all blocks of {worker} free")
        assert (await router.metrics(worker))["vllm:kv_cache_usage_perc"] == 0


async def test_the_work_of_a_router_ends_when_it_falls_silent_and_not_before(shared: Pair) -> None:
    router = shared.router
    await shared.read("held", PROMPT[::-1])
    await router.first(KvReady)
    beats = router.beats_heard[shared.p]
    await until(lambda: router.beats_heard[shared.p] >= beats + 13, "six seconds and a half", 12)
    assert not _nothing_promised(router.beats[shared.p])
    router.silence()
    await router.beat_with(shared.p, _nothing_promised, "the end of its work", 12)


async def test_a_draining_worker_finishes_its_answer_and_leaves_with_zero(start: Start) -> None:
    pair = await start(only=Role.DECODE)
    router = pair.router
    await pair.reserve("a", 0, params=SamplingParams(max_tokens=90, temperature=0.0, ignore_eos=True))
    await until(lambda: bool(router.tokens(0, 1)), "the first token")
    pair.decode.process.send_signal(signal.SIGTERM)
    await until(lambda: router.beats[pair.d].draining, "a draining beat")
    refusal = await router.ask(pair.d, router.decode_job(pair.d, pair.rid("b"), 1, PROMPT))
    assert isinstance(refusal, Refused)
    assert refusal.reason is RefuseReason.DRAINING
    await until(lambda: router.finished(0), "the answer")
    assert len(router.tokens(0, 1)) == 90
    done = FinAck(router.name, router.beats[pair.d].incarnation, (0,))
    await router.bus.publish(router.subjects.worker_in(pair.d), done)
    code, said = await pair.decode.ended()
    assert (code, "Traceback" in said) == (0, False)


async def test_a_second_signal_leaves_at_once(start: Start) -> None:
    pair = await start(only=Role.PREFILL)
    await pair.read("a")
    await pair.router.first(KvReady)
    pair.prefill.process.send_signal(signal.SIGTERM)
    await until(lambda: pair.router.beats[pair.p].draining, "a draining beat")
    pair.prefill.process.send_signal(signal.SIGINT)
    code, said = await pair.prefill.ended(within_s=20)  # of the 60 it may drain
    assert (code, "Traceback" in said) == (0, False)


async def test_an_engine_that_crashes_fails_its_jobs_and_ends_the_process(start: Start) -> None:
    pair = await start(only=Role.DECODE, SPLITSERVE_FAULTS="engine.step_raise:3")
    router = pair.router
    await pair.reserve("a", 0)
    await until(lambda: router.finished(0), "the end of the answer")
    rows = [row for frame in router.all(TokenFrame) for row in frame.rows()]
    assert rows[-1].finish is FinishReason.ERROR
    code, said = await pair.decode.ended()
    assert code == 1
    assert "engine crashed" in said


async def test_a_worker_without_a_bus_says_so_and_gives_up(tiny_model: Path) -> None:
    worker = WorkerProcess(Role.DECODE, "d9", "nats://127.0.0.1:1", tiny_model, "--connect-timeout", "1")
    code, said = await worker.ended(within_s=START_S)
    assert code == 8
    assert "did not answer in 1 s" in said


async def test_a_worker_that_never_becomes_ready_says_so_in_its_beats(start: Start) -> None:
    pair = await start(SPLITSERVE_FAULTS="worker.never_ready")
    assert not pair.router.beats[pair.p].ready
    assert not pair.router.beats[pair.d].ready


def ids_of(router: RouterInTest, count: int) -> tuple[int, ...]:
    """A prompt that no other test has: what is cached of it is this test's own."""
    numbers = random.Random(f"{router.name}/{count}")
    return tuple(numbers.randrange(3, 96) for _ in range(count))


def _nothing_promised(beat: Beat) -> bool:
    return beat.promised_blocks == 0


def _all_free(beat: Beat) -> bool:
    return beat.free_blocks == beat.total_blocks
