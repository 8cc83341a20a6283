from __future__ import annotations

import time

import pytest

from splitserve.engine import door
from splitserve.engine.door import Mode
from splitserve.engine.execution import Execution
from splitserve.protocol.params import SamplingParams
from splitserve.protocol.states import FinishReason
from support.engines import Bench
from support.toy_runner import reference, toy_token


def prompt(number: int, length: int = 10) -> list[int]:
    """Prompts that share no block."""
    return [number * 1000 + position for position in range(length)]


def preempted(bench: Bench) -> list[door.Key]:
    return [event.key for batch in bench.batches for event in batch.events if isinstance(event, door.Preempted)]


def test_decodes_come_first_and_chunks_fill_what_the_budget_leaves():
    bench = Bench(chunk_tokens=6)
    bench.add("a", prompt(1, 4), max_tokens=50)
    bench.step()
    bench.add("b", prompt(2, 5), max_tokens=50)
    bench.add("c", prompt(3, 9), max_tokens=50)
    bench.step()
    bench.step()
    bench.step()

    shapes = [(batch.num_decodes, [len(row.ids) for row in batch.rows]) for batch in bench.runner.batches]
    assert shapes == [(0, [4]), (1, [1, 5, 1]), (2, [1, 1, 6]), (2, [1, 1, 2])]


def test_chunks_are_larger_while_nothing_decodes_beside_them():
    bench = Bench(chunk_tokens=2, lone_chunk_tokens=5)
    bench.add("a", prompt(1, 7), max_tokens=50)
    bench.step()
    bench.step()
    bench.add("b", prompt(2, 3), max_tokens=50)
    bench.step()
    bench.step()

    shapes = [(batch.num_decodes, [len(row.ids) for row in batch.rows]) for batch in bench.runner.batches]
    assert shapes == [(0, [5]), (0, [2]), (1, [1, 2]), (1, [1, 1])]


@pytest.mark.parametrize(("decodes", "chunk"), [(1, 5), (2, 2), (3, 2)])
def test_the_more_sequences_wait_for_a_step_the_less_prompt_it_reads_but_always_a_quarter(decodes: int, chunk: int):
    bench = Bench(chunk_tokens=8, tokens_a_decode=3)
    for number in range(decodes):
        bench.add(number, prompt(number, 1), max_tokens=50)
    bench.step()
    bench.add("long", prompt(9, 20), max_tokens=50)
    bench.step()

    assert [len(row.ids) for row in bench.runner.batches[-1].rows] == [*[1] * decodes, chunk]


def test_a_step_that_takes_in_a_sequence_handed_over_reads_no_prompt_beside_it_but_no_two_in_a_row():
    bench = Bench(chunk_tokens=2)
    for key in ("moved", "moved too"):
        bench.add(key, prompt(1), Mode.AWAIT, max_tokens=50)
    bench.add("a", prompt(2, 1), max_tokens=50)
    bench.step()
    bench.add("b", prompt(3, 7), max_tokens=50)
    bench.step()
    for key in ("moved", "moved too"):
        bench.load(key, prompt(1), 0, [toy_token(prompt(1), 100, 0)])
        bench.step()
    bench.step()

    shapes = [(batch.num_decodes, [len(row.ids) for row in batch.rows]) for batch in bench.runner.batches]
    assert shapes == [(0, [1]), (1, [1, 2]), (2, [1, 1]), (3, [1, 1, 1, 2]), (3, [1, 1, 1, 2])]


def test_a_batch_has_no_more_sequences_than_seats():
    bench = Bench(max_num_seqs=3, chunk_tokens=64)
    for number in range(6):
        bench.add(number, prompt(number), max_tokens=5)
    bench.step()
    first = bench.batches[-1].stats
    bench.run()

    assert first is not None
    assert (first.running, first.waiting) == (3, 3)
    assert max(len(batch.rows) for batch in bench.runner.batches) == 3
    assert all(bench.outputs[number, 0] == reference(prompt(number), 100, 5) for number in range(6))


def test_loaded_jobs_wait_for_seats_and_are_counted_as_waiting_not_as_awaiting():
    bench = Bench(max_num_seqs=1)
    for key in ("a", "b", "c"):
        bench.add(key, prompt(1), Mode.AWAIT, max_tokens=4)
    bench.answer()
    for key in ("a", "b"):
        bench.load(key, prompt(1), 0, [toy_token(prompt(1), 100, 0)])
    bench.step()
    stats = bench.batches[-1].stats

    assert stats is not None
    assert (stats.running, stats.waiting, stats.awaiting) == (1, 1, 1)
    bench.run()
    assert bench.outputs["b", 0] == reference(prompt(1), 100, 4)


def test_a_job_of_more_sequences_than_there_are_seats_is_rejected_with_both_numbers():
    bench = Bench(max_num_seqs=3)
    bench.add("a", prompt(2), n=4)
    bench.add("b", prompt(2), Mode.PREFILL, n=4)
    bench.run()

    assert bench.last("a") == door.Rejected("a", "4 sequences are more than the 3 of a batch (--max-num-seqs)")
    assert bench.of("b", door.Prefilled), "the prompt is one row"


def test_a_lower_priority_number_goes_first():
    bench = Bench(max_num_seqs=1)
    bench.add("later", prompt(1), max_tokens=2, priority=1)
    bench.add("sooner", prompt(2), max_tokens=2, priority=-1)
    bench.run()

    order = [event.key for batch in bench.batches for event in batch.events if isinstance(event, door.Gone)]
    assert order == ["sooner", "later"]


def test_the_newest_gives_way_when_a_decode_finds_the_pool_dry_and_the_oldest_gets_on():
    bench = Bench(blocks=8, chunk_tokens=64)
    for number in range(3):
        bench.add(number, prompt(number, 7), max_tokens=17)
    bench.run()

    assert preempted(bench) == [2, 1]
    assert bench.outputs[0, 0] == reference(prompt(0, 7), 100, 17)
    for number in (1, 2):
        done = bench.outputs[number, 0]
        assert done == reference(prompt(number, 7), 100, len(done))
    assert bench.pool.stats.owned == bench.pool.stats.filling == 0
    assert sum(batch.stats.preemptions for batch in bench.batches if batch.stats) == 2


def test_a_less_important_job_gives_way_before_a_newer_one():
    bench = Bench(blocks=6, chunk_tokens=64)
    bench.add("old", prompt(0, 7), max_tokens=12, priority=1)
    bench.add("new", prompt(1, 7), max_tokens=12)
    bench.run()

    assert preempted(bench) == ["old"]


def test_all_sequences_of_a_preempted_job_leave_together():
    bench = Bench(blocks=9, chunk_tokens=64)
    bench.add("a", prompt(0, 7), max_tokens=12)
    bench.add("b", prompt(1, 6), n=3, max_tokens=12)
    bench.run()

    assert preempted(bench) == ["b"]
    assert bench.outputs["a", 0] == reference(prompt(0, 7), 100, 12)
    assert bench.pool.stats.owned == bench.pool.stats.filling == 0


def test_a_prompt_that_gives_way_is_computed_again_later_and_nobody_is_told():
    bench = Bench(blocks=8, chunk_tokens=2)
    bench.add("a", prompt(0, 4), max_tokens=12)
    for _ in range(2):
        bench.step()
    bench.add("b", prompt(1, 20), Mode.PREFILL)
    bench.run()

    assert bench.outputs["a", 0] == reference(prompt(0, 4), 100, 12)
    assert preempted(bench) == []
    (restart,) = (batch for batch in bench.batches if batch.stats and batch.stats.preemptions)
    assert restart.queued_tokens == 20, "all of it is to be computed again"
    (ready,) = bench.of("b", door.Prefilled)
    assert isinstance(ready, door.Prefilled)
    assert ready.first_ids == (toy_token(prompt(1, 20), 100, 0),)


def test_a_sequence_that_outgrows_the_pool_alone_gives_way_itself():
    bench = Bench(blocks=2)
    bench.add("a", prompt(0, 4), max_tokens=50)
    bench.run()

    assert preempted(bench) == ["a"]
    assert bench.outputs["a", 0] == reference(prompt(0, 4), 100, 5)


def test_held_and_awaited_blocks_are_never_taken_and_their_end_wakes_those_who_wait():
    bench = Bench(blocks=8)
    bench.add("held", prompt(0), Mode.PREFILL)
    bench.run()
    bench.add("awaited", prompt(1), Mode.AWAIT)
    bench.answer()
    bench.add("waits", prompt(2), Mode.PREFILL)
    bench.run()
    assert bench.events["waits"] == []
    assert not bench.engine.has_work, "a host must not spin"

    bench.engine.submit(door.Release("held"))
    bench.answer()
    assert bench.engine.has_work
    bench.run()
    assert bench.of("waits", door.Prefilled)
    assert bench.pool.stats.filling == 3


def test_cached_blocks_are_given_up_for_new_prompts():
    bench = Bench(blocks=6)
    for number in range(5):
        bench.add(number, prompt(number), max_tokens=3)
        bench.run()

    assert all(bench.outputs[number, 0] == reference(prompt(number), 100, 3) for number in range(5))


def test_a_new_prompt_leaves_a_block_for_each_sequence_that_decodes():
    bench = Bench(blocks=6, chunk_tokens=64)
    bench.add("a", prompt(0, 7), max_tokens=6)
    bench.step()
    bench.add("b", prompt(1, 16), max_tokens=1)
    bench.step()

    assert bench.events["b"] == []
    bench.run()
    assert preempted(bench) == []


# --- the end of a sequence ---

IDS = [3, 1, 4, 1, 1]
TOKENS = reference(IDS, 100, 12)


@pytest.mark.parametrize(
    ("params", "eos", "length", "reason"),
    [
        (SamplingParams(12), (), 12, FinishReason.LENGTH),
        (SamplingParams(12), (TOKENS[3],), TOKENS.index(TOKENS[3]) + 1, FinishReason.STOP),
        (SamplingParams(12, ignore_eos=True), (TOKENS[3],), 12, FinishReason.LENGTH),
        (SamplingParams(12, stop_token_ids=(TOKENS[4],)), (), TOKENS.index(TOKENS[4]) + 1, FinishReason.STOP),
        (SamplingParams(12, ignore_eos=True, stop_token_ids=(TOKENS[4],)), (TOKENS[1],),
         TOKENS.index(TOKENS[4]) + 1, FinishReason.STOP),
        (SamplingParams(12, min_tokens=6, stop_token_ids=(TOKENS[2],)), (TOKENS[1],), 12, FinishReason.LENGTH),
        (SamplingParams(12, min_tokens=4), (TOKENS[3],), 4, FinishReason.STOP),
        (SamplingParams(1), (TOKENS[0],), 1, FinishReason.STOP),
    ],
)  # fmt: skip
def test_a_sequence_ends_at_a_stop_id_or_its_length(
    params: SamplingParams, eos: tuple[int, ...], length: int, reason: FinishReason
):
    assert len(set(TOKENS)) == len(TOKENS), "the table needs tokens that differ"
    bench = Bench(eos_ids=eos)
    bench.add("a", IDS, params=params)
    bench.run()

    assert bench.outputs["a", 0] == TOKENS[:length]
    last = bench.of("a", door.TokenEvent)[-1]
    assert isinstance(last, door.TokenEvent)
    assert last.finish is reason


def test_a_sequence_ends_when_the_context_is_full():
    bench = Bench(max_model_len=9)
    bench.add("a", IDS, max_tokens=50)
    bench.run()

    assert bench.outputs["a", 0] == TOKENS[:4]


def test_logprobs_come_with_their_tokens_only_where_asked_for():
    bench = Bench()
    bench.add("a", IDS, params=SamplingParams(3, logprobs=0))
    bench.add("b", IDS, params=SamplingParams(3))
    bench.run()

    lengths = {
        key: [len(event.logprobs) for event in bench.events[key] if isinstance(event, door.TokenEvent)] for key in "ab"
    }
    assert lengths == {"a": [1, 1, 1], "b": [0, 0, 0]}


def test_durations_are_told_in_an_attempts_first_event_only():
    bench = Bench(chunk_tokens=3)
    bench.add("local", IDS, max_tokens=2)
    bench.run()
    bench.add("moved", IDS, Mode.AWAIT, max_tokens=3)
    bench.answer()
    bench.load("moved", IDS, 0, TOKENS[:1])
    bench.run()

    told = {key: [e for e in bench.events[key] if isinstance(e, door.TokenEvent)] for key in ("local", "moved")}
    assert [(e.queue_s, e.prefill_s, e.first_step_s) for e in told["local"]] == [(1.0, 3.0, 0.0), (None, 0.0, 0.0)]
    assert [(e.queue_s, e.prefill_s, e.first_step_s) for e in told["moved"]] == [(1.0, 0.0, 1.0), (None, 0.0, 0.0)]


def test_bookkeeping_of_a_step_of_64_sequences_takes_well_under_a_millisecond():
    bench = Bench(blocks=64 * 25, block_tokens=16, max_num_seqs=64, chunk_tokens=4096, max_model_len=4096)
    for number in range(64):
        bench.add(number, prompt(number, 64), max_tokens=300)
    bench.step()
    best = float("inf")
    for _ in range(100):
        began = time.thread_time()
        batch = bench.engine.begin()
        between = time.thread_time()
        assert batch is not None
        output = bench.runner.toy.execute(batch)
        resumed = time.thread_time()
        bench.engine.finish(Execution(output))
        best = min(best, between - began + time.thread_time() - resumed)

    assert best < 1e-3, f"{best * 1e3:.2f} ms"
