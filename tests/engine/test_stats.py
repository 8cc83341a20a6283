"""What a step tells of itself: work by kind, and nothing of jobs that are not to be counted."""

from __future__ import annotations

from splitserve.engine import door
from splitserve.engine.door import Mode
from splitserve.engine.execution import execute
from splitserve.protocol.params import SamplingParams
from support.engines import Bench

PROMPT = [*range(10, 20)]


def stats_of(bench: Bench) -> list[door.StepStats]:
    return [batch.stats for batch in bench.batches if batch.stats]


def test_each_prompt_token_is_counted_once_where_it_is_computed() -> None:
    bench = Bench(chunk_tokens=4)
    bench.add("a", PROMPT, Mode.PREFILL)
    bench.run()
    assert [s.prefill_tokens for s in stats_of(bench)] == [4, 4, 2]
    assert [s.samples for s in stats_of(bench)] == [0, 0, 1]


def test_a_step_says_how_far_its_tokens_look_back() -> None:
    bench = Bench(chunk_tokens=16)
    bench.add("a", PROMPT, max_tokens=3)
    bench.run()
    first, second, third = stats_of(bench)
    assert (first.prefill_tokens, first.attended, first.context) == (10, 100, 0)
    assert (second.decode_tokens, second.attended, second.context) == (1, 11, 11)
    assert (third.decode_tokens, third.attended, third.context) == (1, 12, 12)


def test_what_siblings_compute_again_of_their_prompt_is_told_apart() -> None:
    bench = Bench(chunk_tokens=64, block_tokens=4)
    bench.add("a", PROMPT, Mode.AWAIT, n=3, max_tokens=4)
    bench.answer()
    bench.load("a", PROMPT, 0, (1, 2, 3))
    bench.run()
    stats = stats_of(bench)
    assert sum(s.prefill_tokens for s in stats) == 0
    assert sum(s.replayed_tokens for s in stats) == 2 * (len(PROMPT) % 4)  # by all siblings but one
    assert sum(s.decode_tokens for s in stats) == 3 * 3  # the first of four came with the transfer


def test_a_job_that_is_not_counted_is_in_no_number() -> None:
    bench = Bench()
    one, params = tuple(PROMPT), SamplingParams(max_tokens=4)
    bench.outputs["probe", 0] = []
    bench.engine.submit(door.Add("probe", Mode.LOCAL, one, len(one), ((),), params, (1,), counted=False))
    bench.run()
    assert len(bench.outputs["probe", 0]) == 4
    for s in stats_of(bench):
        work = (s.prefill_tokens, s.decode_tokens, s.samples, s.attended, s.context, s.prefix_queries, s.prefix_hits)
        assert set(work) == {0}


def test_others_beside_it_are_counted() -> None:
    bench = Bench()
    one, params = tuple(PROMPT), SamplingParams(max_tokens=4)
    bench.outputs["probe", 0] = []
    bench.engine.submit(door.Add("probe", Mode.LOCAL, one, len(one), ((),), params, (1,), counted=False))
    bench.add("a", [30, 31, 32], max_tokens=4)
    bench.run()
    assert sum(s.prefill_tokens for s in stats_of(bench)) == 3
    assert sum(s.decode_tokens for s in stats_of(bench)) == 3
    assert sum(s.prefix_queries for s in stats_of(bench)) == 3


def test_the_load_is_that_of_the_step_under_way() -> None:
    bench = Bench(chunk_tokens=16, max_num_seqs=1)
    bench.add("a", PROMPT, Mode.PREFILL)
    bench.add("b", [*range(30, 40)], Mode.PREFILL)
    batch = bench.engine.begin()
    assert batch is not None
    assert bench.engine.load == (1, 1)
    bench.engine.finish(execute(bench.runner, batch))
    bench.run()
    assert bench.engine.load == (0, 0)
