"""**A core that only decides.** Everything that decides is a class with two methods: `handle(event, now)` gives a list of
commands, `wake_at()` says when time alone will matter. It never waits, sends, or looks at a clock: a shell round it does.
So a test is a conversation, and a whole cluster can be simulated in one process, faults included.

Here the core of a prefill worker is told what happens, event by event. Its whole life: queued, running, held, freed.
"""

from __future__ import annotations

from splitserve.engine import door
from splitserve.prefill.jobs import PrefillJobs
from splitserve.protocol.effects import Answer, Publish, Received, Tick
from splitserve.protocol.messages import Accepted, Cancel, KvReady, Refused, Release
from splitserve.protocol.states import RefuseReason
from splitserve.worker.effects import EngineBatch, ToEngine
from support.worker_cores import SUBJECTS, identity, prefill_job, prefilled

NOTHING_HELD = door.PoolStats(total=100, free=100, filling=0, owned=0, cached=0)


def core() -> PrefillJobs:
    return PrefillJobs(identity(), SUBJECTS, new_token=lambda: "secret")


def engine_says(*events: door.Event) -> EngineBatch:
    return EngineBatch(door.Batch(events, None, NOTHING_HELD, 0))


def test_a_job_is_answered_and_handed_to_the_engine_in_one_list_of_commands() -> None:
    answer, work = core().handle(Received(prefill_job("r1"), reply_to="inbox"), now=0)
    assert isinstance(answer, Answer)
    assert isinstance(answer.message, Accepted)
    assert isinstance(work, ToEngine)
    assert isinstance(work.command, door.Add)


def test_the_same_job_twice_gets_the_same_answer_and_runs_once() -> None:
    worker = core()
    first, _ = worker.handle(Received(prefill_job("r1"), reply_to="inbox"), now=0)
    assert worker.handle(Received(prefill_job("r1"), reply_to="inbox"), now=0.1) == [first]


def test_a_computed_prompt_is_told_to_the_router_and_to_the_decode_worker_at_once() -> None:
    worker = core()
    worker.handle(Received(prefill_job("r1")), now=0)
    told = [c for c in worker.handle(engine_says(prefilled("r1")), now=0.1) if isinstance(c, Publish)]
    assert [command.subject for command in told] == ["ss1.test.r.r1.ev", "ss1.test.w.d.kv"]
    assert told[0].message == told[1].message
    assert len(worker.leases) == 1


def test_a_release_frees_the_blocks_and_if_it_is_lost_time_does() -> None:
    released, forgotten = core(), core()
    for worker in (released, forgotten):
        worker.handle(Received(prefill_job("r1")), now=0)
        commands = worker.handle(engine_says(prefilled("r1")), now=1)
        (ready, _) = (c.message for c in commands if isinstance(c, Publish) and isinstance(c.message, KvReady))
        assert isinstance(ready, KvReady)
    free = ToEngine(door.Release(("r1", 1)))
    assert free in released.handle(Received(Release(ready.handle.id, "secret")), now=2)
    assert free not in forgotten.handle(Tick(), now=15.9)
    assert free in forgotten.handle(Tick(), now=16)


def test_a_job_that_comes_behind_its_cancel_does_not_run() -> None:
    worker = core()
    worker.handle(Received(Cancel("r1", incarnation=7, pa=1, da=0, reason="the client left")), now=0)
    (answer,) = worker.handle(Received(prefill_job("r1", pa=1), reply_to="inbox"), now=1)
    assert isinstance(answer, Answer)
    assert isinstance(answer.message, Refused)
    assert answer.message.reason is RefuseReason.STALE_ATTEMPT
