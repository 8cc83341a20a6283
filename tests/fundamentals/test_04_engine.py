"""**The engine's step.** Prefill and decode workers run the same engine. Commands go in by one door, one batch of events
comes out of the other with each step: some tokens of prompts (a chunk), one token of each answer, all in one batch.

The model here is a toy whose KV is the token ids themselves. It reads them back through the block tables, so a wrong
table or a block that was reused too early would give another token. `Bench` drives the engine, and checks every write.
"""

from __future__ import annotations

from splitserve.engine import door
from support.engines import Bench
from support.toy_runner import reference

PROMPT = tuple(range(10))


def test_an_answer_is_as_long_as_asked_for_and_is_the_models() -> None:
    bench = Bench()
    bench.add("job", PROMPT, max_tokens=6)
    bench.run()
    assert bench.outputs["job", 0] == reference(PROMPT, seed=100, count=6)
    assert isinstance(bench.last("job"), door.Gone)  # each job leaves exactly once


def test_a_long_prompt_is_read_in_chunks_so_that_running_answers_do_not_stall() -> None:
    bench = Bench(chunk_tokens=16)
    bench.add("long", range(100, 140), max_tokens=2)
    bench.run()
    read = [event.tokens for event in bench.events["long"] if isinstance(event, door.Progress)]
    assert read == [16, 32, 40]


def test_one_step_serves_every_running_answer_with_one_token() -> None:
    bench = Bench()
    for name in ("a", "b", "c"):
        bench.add(name, (ord(name), 1, 2), max_tokens=5)
    bench.run()
    assert max(batch.num_decodes for batch in bench.runner.batches) == 3
    assert len(bench.runner.batches) == 5  # not fifteen


def test_a_prompt_seen_before_is_not_computed_again_but_for_its_last_block() -> None:
    bench = Bench(block_tokens=4)
    bench.add("first", PROMPT, max_tokens=1)
    bench.run()
    computed = bench.runner.toy.computed_tokens
    bench.add("second", PROMPT, max_tokens=1)
    bench.run()
    assert bench.runner.toy.computed_tokens - computed == len(PROMPT) - 8  # two full blocks were cached


def test_when_the_pool_runs_dry_the_youngest_gives_way_and_says_so() -> None:
    bench = Bench(blocks=6, block_tokens=4)
    bench.add("old", PROMPT, max_tokens=12)
    bench.add("young", range(50, 60), max_tokens=12)
    bench.run()
    assert isinstance(bench.last("young"), door.Preempted)  # its router places it anew; nothing is lost
    assert bench.outputs["old", 0] == reference(PROMPT, seed=100, count=12)
