"""The engine's thread, round a real engine over the toy model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import pytest

from splitserve.engine import door
from splitserve.engine.batch import StepBatch, StepOutput
from splitserve.engine.engine import Engine
from splitserve.engine.sequence import EngineConfig
from splitserve.faultpoints import Faults
from splitserve.kv.pool import BlockPool
from splitserve.kv.prefix import PrefixIndex
from splitserve.protocol.params import SamplingParams
from splitserve.worker.host import Host
from support.toy_runner import ToyRunner, ToyStorage
from support.waiting import until

BLOCKS, BLOCK = 32, 4


class Gated(ToyRunner):
    """A step waits while the gate is shut."""

    def __init__(self) -> None:
        super().__init__(ToyStorage(BLOCKS, BLOCK))
        self.gate = threading.Event()
        self.gate.set()

    def execute(self, batch: StepBatch) -> StepOutput:
        self.gate.wait(30)
        return super().execute(batch)


class Running:
    """A started host, and what came out of it."""

    def __init__(self, faults: str = "", on_event: Callable[[door.Event], None] = lambda event: None) -> None:
        self.runner = Gated()
        pool = BlockPool(BLOCKS)
        config = EngineConfig(BLOCK, 4, 8, 128, frozenset(), "toy")
        engine = Engine(config, pool, PrefixIndex(pool), self.runner, asyncio.get_running_loop().time)
        self.events: list[door.Event] = []
        self.threads: set[str] = set()
        self.host = Host(engine, self._on_batch, on_event=on_event, faults=Faults(faults))
        self.host.start()

    def _on_batch(self, batch: door.Batch) -> None:
        self.threads.add(threading.current_thread().name)
        self.events += batch.events

    def add(self, key: str, max_tokens: int = 3) -> None:
        params = SamplingParams(max_tokens=max_tokens)
        self.host.submit(door.Add(key, door.Mode.LOCAL, (1, 2, 3), 3, ((),), params, (1,)))

    def told(self, kind: type[door.Event], key: str) -> bool:
        return any(isinstance(event, kind) and event.key == key for event in self.events)


@asynccontextmanager
async def running(
    faults: str = "", on_event: Callable[[door.Event], None] = lambda event: None
) -> AsyncGenerator[Running]:
    made = Running(faults, on_event)
    try:
        yield made
    finally:
        made.runner.gate.set()
        assert await made.host.stop()


async def test_jobs_run_in_the_thread_and_their_events_come_in_order_to_the_loop() -> None:
    seen: list[str] = []
    async with running(on_event=lambda event: seen.append(threading.current_thread().name)) as made:
        made.add("a")
        await until(lambda: made.told(door.Gone, "a"), "the end of the job")
        tokens = [event.first_index for event in made.events if isinstance(event, door.TokenEvent)]
        assert tokens == [0, 1, 2]
        assert made.threads == {threading.current_thread().name}
        assert set(seen) == {"engine"}
        assert len(seen) == len(made.events)


async def test_a_command_under_a_step_is_carried_out_behind_it() -> None:
    async with running() as made:
        made.runner.gate.clear()
        made.add("a", max_tokens=100)
        await until(lambda: made.host.step_age_ms > 0, "a step under way")
        made.host.submit(door.Abort("a"))
        made.runner.gate.set()
        await until(lambda: made.told(door.Gone, "a"), "the end of the job")
        assert sum(isinstance(event, door.TokenEvent) for event in made.events) == 1


async def test_the_age_of_a_wedged_step_grows_and_is_zero_when_idle() -> None:
    async with running() as made:
        assert made.host.step_age_ms == 0
        made.runner.gate.clear()
        made.add("a", max_tokens=1)
        await until(lambda: made.host.step_age_ms > 50, "a step of 50 ms")
        made.runner.gate.set()
        await until(lambda: made.told(door.Gone, "a"), "the end of the job")
        assert made.host.step_age_ms == 0


async def test_an_engine_that_raises_fails_every_job_it_had_and_says_why() -> None:
    async with running("engine.step_raise:4") as made:
        made.add("done", max_tokens=1)
        await until(lambda: made.told(door.Gone, "done"), "the end of the first job")
        made.add("a", max_tokens=50)
        made.add("b", max_tokens=50)
        why = await asyncio.wait_for(made.host.crashed, 10)
        assert "told to raise" in why
        assert {event.key for event in made.events if isinstance(event, door.Failed)} == {"a", "b"}


async def test_a_job_that_comes_after_the_crash_is_failed_too() -> None:
    async with running("engine.step_raise:1") as made:
        made.add("a")
        await asyncio.wait_for(made.host.crashed, 10)
        made.add("b")
        await until(lambda: made.told(door.Failed, "b"), "the end of the late job")


@pytest.mark.parametrize("work", [False, True], ids=["idle", "busy"])
async def test_a_stop_ends_the_thread(work: bool) -> None:
    async with running() as made:
        if work:
            made.add("a", max_tokens=100)
        assert await made.host.stop()
    assert "engine" not in {thread.name for thread in threading.enumerate()}


async def test_a_stop_in_a_hurry_does_not_wait_for_a_long_step() -> None:
    hurried: list[bool] = []
    async with running() as made:
        made.runner.gate.clear()
        made.add("a")
        await until(lambda: made.host.step_age_ms > 0, "a step under way")
        asyncio.get_running_loop().call_later(0.1, hurried.append, True)
        async with asyncio.timeout(10):
            assert not await made.host.stop(60, lambda: bool(hurried))


async def test_a_stop_gives_up_on_a_step_that_never_ends() -> None:
    async with running() as made:
        made.runner.gate.clear()
        made.add("a")
        await until(lambda: made.host.step_age_ms > 0, "a step under way")
        assert not await made.host.stop(within_s=0.05)


async def test_what_arrives_under_a_step_counts_as_waiting() -> None:
    async with running() as made:
        made.runner.gate.clear()
        made.add("a")
        await until(lambda: made.host.step_age_ms > 0 and made.host.load[0] == 1, "the step of the first")
        made.add("b")
        assert made.host.load == (1, 1)
        made.runner.gate.set()
        await until(lambda: made.host.load == (0, 0), "the end of both")
