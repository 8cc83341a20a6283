from __future__ import annotations

import pytest

from splitserve.engine import door
from splitserve.engine.batch import StepOutput
from splitserve.engine.door import Mode
from splitserve.engine.execution import Execution
from splitserve.errors import EngineFailed
from splitserve.kv.pool import BlockState
from splitserve.kv.prefix import block_hashes, chain_seed
from splitserve.protocol.params import SamplingParams
from splitserve.protocol.states import FinishReason
from support.engines import Bench
from support.toy_runner import GARBAGE, reference, toy_token

PROMPT = list(range(1, 11))  # 10 ids: two whole blocks of 4, and a half


def one(events: list[door.Event]) -> door.Event:
    (event,) = events
    return event


# --- LOCAL ---


@pytest.mark.parametrize("chunk_tokens", [1, 3, 4, 64])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 10])
def test_a_local_job_gives_the_tokens_of_a_straight_run_whatever_the_chunk(length: int, chunk_tokens: int):
    bench = Bench(chunk_tokens=chunk_tokens)
    bench.add("a", PROMPT[:length], max_tokens=9)
    bench.run()

    assert bench.outputs["a", 0] == reference(PROMPT[:length], 100, 9)
    assert isinstance(bench.last("a"), door.Gone)
    assert bench.pool.stats.owned == bench.pool.stats.filling == 0
    tokens = [event for event in bench.events["a"] if isinstance(event, door.TokenEvent)]
    assert [event.finish for event in tokens] == [FinishReason.RUNNING] * 8 + [FinishReason.LENGTH]


def test_progress_tells_each_chunk_of_a_prompt_with_cached_tokens_counted():
    bench = Bench(chunk_tokens=4)
    bench.add("a", PROMPT, max_tokens=1)
    bench.run()
    bench.add("b", PROMPT, max_tokens=1)
    bench.run()

    assert bench.of("a", door.Progress) == [door.Progress("a", done) for done in (4, 8, 10)]
    assert bench.of("b", door.Progress) == [door.Progress("b", 10)]


def test_blocks_of_a_prompt_for_others_are_told_once_when_they_are_full_and_the_job_goes_on():
    bench = Bench(chunk_tokens=6)
    ids = tuple(range(16))
    hashes = block_hashes(ids, 4, chain_seed("toy"))
    bench.add("a", ids, Mode.PREFILL)
    bench.run()
    first, second, last = [event for event in bench.events["a"] if isinstance(event, door.Progress)]
    assert (first.tokens, len(first.groups[0].blocks), first.chain_hash) == (6, 1, hashes[0].hex())
    assert (second.tokens, len(second.groups[0].blocks), second.chain_hash) == (12, 2, hashes[2].hex())
    assert (last.tokens, last.groups) == (16, ())  # `Prefilled` names them all
    (done,) = [event for event in bench.events["a"] if isinstance(event, door.Prefilled)]
    told = [*first.groups[0].blocks, *second.groups[0].blocks]
    assert done.groups[0].blocks[:3] == tuple(told)
    assert done.groups[0].generations[:3] == first.groups[0].generations + second.groups[0].generations


def test_a_cached_prefix_is_told_before_the_model_runs():
    bench = Bench()
    bench.add("a", PROMPT, Mode.PREFILL)
    bench.run()
    bench.add("b", PROMPT, Mode.PREFILL)
    early: list[door.Batch] = []
    bench.engine.step(early.append)
    ((told,),) = [batch.events for batch in early]
    assert isinstance(told, door.Progress)
    assert (told.key, told.tokens, len(told.groups[0].blocks)) == ("b", 8, 2)


def test_a_release_ends_a_job_whose_blocks_are_read_while_it_is_computed():
    bench = Bench(chunk_tokens=4)
    bench.add("a", PROMPT, Mode.PREFILL)
    bench.step()
    bench.engine.submit(door.Release("a"))
    bench.run()
    assert isinstance(bench.last("a"), door.Gone)
    assert bench.pool.stats.owned == 0


def test_without_prefix_reuse_a_handle_has_its_proof_too():
    bench = Bench(prefix_caching=False)
    bench.add("a", PROMPT, Mode.PREFILL)
    bench.run()
    (done,) = [event for event in bench.events["a"] if isinstance(event, door.Prefilled)]
    assert done.chain_hash == block_hashes(PROMPT, 4, chain_seed("toy"))[-1].hex()


def test_n_sequences_share_whole_prompt_blocks_and_each_has_its_own_tokens():
    bench = Bench()
    bench.add("a", PROMPT, n=3, max_tokens=6)
    bench.step()
    shared = bench.pool.stats.owned
    bench.step()

    assert shared == 3, "two whole blocks and the partial one"
    assert bench.pool.stats.owned + bench.pool.stats.filling == 5, "two whole blocks, and a last one each"
    bench.run()
    for number in range(3):
        assert bench.outputs["a", number] == reference(PROMPT, 100 + number, 6)
    assert len(bench.of("a", door.Gone)) == 1


def test_outputs_given_to_a_local_job_are_computed_again_and_not_told_again():
    whole = reference(PROMPT, 100, 9)
    bench = Bench(chunk_tokens=3)
    bench.add("a", PROMPT, outputs=[whole[:4]], max_tokens=9)
    bench.run()

    assert bench.outputs["a", 0] == whole
    assert [event.first_index for event in bench.events["a"] if isinstance(event, door.TokenEvent)] == [4, 5, 6, 7, 8]


def test_outputs_of_n_sequences_are_replayed_each_from_the_shared_prompt():
    wholes = [reference(PROMPT, 100 + number, 9) for number in range(3)]
    bench = Bench(chunk_tokens=3)
    bench.add("a", PROMPT, outputs=[wholes[0][:5], wholes[1], []], max_tokens=9)
    bench.run()

    assert [bench.outputs["a", number] for number in range(3)] == wholes
    ended = [e for e in bench.events["a"] if isinstance(e, door.TokenEvent) and e.sequence == 1]
    assert ended == [door.TokenEvent("a", 1, 9, (), FinishReason.LENGTH)], "its end came with the job"


# --- PREFILL ---


def test_a_prefilled_job_holds_its_blocks_until_release_and_then_leaves_whole_ones_cached():
    bench = Bench(chunk_tokens=4)
    bench.add("a", PROMPT, Mode.PREFILL)
    bench.run()
    ready = one(bench.of("a", door.Prefilled))

    assert isinstance(ready, door.Prefilled)
    (group,) = ready.groups
    assert bench.runner.toy.storage.gather(group.blocks, 10) == PROMPT
    assert group.generations == (1, 1, 1)
    assert (ready.kv_tokens, ready.index) == (10, 0)
    assert ready.chain_hash == block_hashes(PROMPT, 4, chain_seed("toy"))[-1].hex()
    assert ready.first_ids == (toy_token(PROMPT, 100, 0),)
    assert ready.finishes == (FinishReason.RUNNING,)
    assert bench.pool.stats.owned == 3
    assert not bench.engine.has_work

    bench.engine.submit(door.Release("a"))
    bench.answer()
    assert isinstance(bench.last("a"), door.Gone)
    assert (bench.pool.stats.owned, bench.pool.stats.cached) == (0, 2)


def test_a_prefill_of_n_sequences_samples_n_first_tokens_of_one_prompt():
    bench = Bench()
    bench.add("a", PROMPT, Mode.PREFILL, n=3, params=SamplingParams(max_tokens=5, logprobs=0))
    bench.run()
    ready = one(bench.of("a", door.Prefilled))

    assert isinstance(ready, door.Prefilled)
    assert ready.first_ids == tuple(toy_token(PROMPT, 100 + number, 0) for number in range(3))
    assert len(ready.logprobs) == 3
    assert bench.runner.toy.computed_tokens == len(PROMPT)


def test_a_prefill_of_prompt_and_outputs_samples_the_next_index():
    outputs = reference(PROMPT, 100, 5)
    bench = Bench()
    bench.add("a", PROMPT + outputs[:4], Mode.PREFILL, prompt_len=10, outputs=[outputs[:4]], max_tokens=5)
    bench.run()
    ready = one(bench.of("a", door.Prefilled))

    assert isinstance(ready, door.Prefilled)
    assert (ready.index, ready.first_ids) == (4, (outputs[4],))
    assert ready.finishes == (FinishReason.LENGTH,)


def test_a_full_prefix_hit_still_computes_the_last_token():
    bench = Bench()
    for key in "ab":
        bench.add(key, PROMPT[:8], Mode.PREFILL)
        bench.run()
    ready = one(bench.of("b", door.Prefilled))

    assert isinstance(ready, door.Prefilled)
    assert ready.cached_tokens == 4
    assert bench.runner.toy.computed_tokens == 8 + 4
    assert ready.first_ids == (toy_token(PROMPT[:8], 100, 0),)


def test_without_prefix_caching_everything_is_computed():
    bench = Bench(prefix_caching=False)
    for key in "ab":
        bench.add(key, PROMPT, max_tokens=3)
        bench.run()

    assert bench.outputs["b", 0] == reference(PROMPT, 100, 3)
    assert bench.runner.toy.computed_tokens == 2 * (10 + 2)
    assert bench.pool.stats.free == bench.pool.total


def test_salted_jobs_do_not_find_each_others_blocks():
    bench = Bench()
    for key, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        bench.engine.submit(
            door.Add(key, Mode.PREFILL, tuple(PROMPT), 10, ((),), SamplingParams(5), (100,), cache_salt=salt)
        )
        bench.run()

    cached = [one(bench.of(key, door.Prefilled)) for key in "abc"]
    assert [event.cached_tokens for event in cached if isinstance(event, door.Prefilled)] == [0, 0, 8]


def test_durations_and_prefix_counts_are_those_of_the_clock_and_the_lookups():
    bench = Bench(chunk_tokens=4)
    bench.add("a", PROMPT, Mode.PREFILL)
    bench.run()
    ready = one(bench.of("a", door.Prefilled))
    assert isinstance(ready, door.Prefilled)
    assert (ready.queue_s, ready.prefill_s) == (1.0, 5.0)  # a reading a second: add, then three steps of two

    bench.add("b", PROMPT, Mode.PREFILL)
    bench.run()
    stats = [batch.stats for batch in bench.batches if batch.stats]
    assert [(s.prefill_tokens, s.prefix_queries, s.prefix_hits) for s in stats] == [
        (4, 10, 0), (4, 0, 0), (2, 0, 0), (2, 10, 8)
    ]  # fmt: skip


def test_queued_tokens_are_those_that_wait_or_are_being_computed_less_cached_ones():
    bench = Bench(chunk_tokens=4)
    bench.add("a", PROMPT, Mode.PREFILL)
    bench.run()
    bench.add("b", [*PROMPT, 50], Mode.PREFILL)
    bench.add("c", [9] * 6, Mode.PREFILL)
    bench.step()
    bench.step()
    bench.step()

    assert [batch.queued_tokens for batch in bench.batches[-3:]] == [3 + 6 - 4, 1, 0]


# --- AWAIT ---


def test_an_awaited_job_gets_its_blocks_at_once_and_decodes_when_loaded_without_computing_the_prompt():
    whole = reference(PROMPT, 100, 7)
    bench = Bench()
    bench.add("a", PROMPT, Mode.AWAIT, max_tokens=7)
    bench.answer()
    reserved = one(bench.of("a", door.Reserved))
    assert isinstance(reserved, door.Reserved)
    assert (len(reserved.groups[0]), reserved.cached_blocks, reserved.cached_tokens) == (3, 0, 0)
    assert bench.pool.stats.filling == 3
    assert not bench.engine.has_work

    bench.load("a", PROMPT, 0, whole[:1])
    bench.run()
    assert bench.outputs["a", 0] == whole
    assert bench.runner.toy.computed_tokens == 6
    assert isinstance(bench.last("a"), door.Gone)


def test_awaited_blocks_enter_the_prefix_index_only_when_loaded():
    bench = Bench()
    for key in "ab":
        bench.add(key, PROMPT, Mode.AWAIT)
    bench.answer()
    bench.load("a", PROMPT, 0, (5,))
    bench.answer()
    bench.add("c", PROMPT, Mode.AWAIT)
    bench.answer()

    assert [event.cached_blocks for key in "abc" for event in bench.events[key] if isinstance(event, door.Reserved)] == [
        0, 0, 2
    ]  # fmt: skip


def test_a_prefix_hit_of_an_awaited_job_needs_no_fetch_and_gives_the_same_tokens():
    whole = reference([*PROMPT, 77], 100, 6)
    bench = Bench()
    bench.add("a", PROMPT, max_tokens=2)
    bench.run()
    bench.add("b", [*PROMPT, 77], Mode.AWAIT, max_tokens=6)
    bench.answer()
    bench.load("b", [GARBAGE] * 8 + [9, 10, 77], 0, whole[:1])
    bench.run()

    assert bench.outputs["b", 0] == whole


def test_an_awaited_job_of_n_sequences_shares_blocks_and_computes_only_the_partial_one_again():
    wholes = [reference(PROMPT, 100 + number, 6) for number in range(3)]
    bench = Bench()
    bench.add("a", PROMPT, Mode.AWAIT, n=3, max_tokens=6)
    bench.answer()
    bench.load("a", PROMPT, 0, [whole[0] for whole in wholes])
    bench.run()

    assert [bench.outputs["a", number] for number in range(3)] == wholes
    assert bench.runner.toy.computed_tokens == 3 * 5 + 2 * 2


def test_an_awaited_job_of_n_sequences_replays_their_outputs():
    wholes = [reference(PROMPT, 100 + number, 12) for number in range(2)]
    bench = Bench(chunk_tokens=4)
    bench.add("a", PROMPT, Mode.AWAIT, outputs=[wholes[0][:7], wholes[1][:3]], max_tokens=12)
    bench.answer()
    bench.load("a", PROMPT, 0, [toy_token(PROMPT, 100, 0), toy_token(PROMPT, 101, 0)])
    bench.run()

    assert [bench.outputs["a", number] for number in range(2)] == wholes


def test_an_awaited_job_may_have_more_outputs_than_its_handle_covers():
    whole = reference(PROMPT, 100, 9)
    bench = Bench()
    bench.add("a", PROMPT, Mode.AWAIT, outputs=[whole[:3]], max_tokens=9)
    bench.answer()
    bench.load("a", PROMPT, 0, whole[:1])
    bench.run()

    assert bench.outputs["a", 0] == whole


def test_an_awaited_resume_covers_prompt_and_outputs():
    whole = reference(PROMPT, 100, 9)
    bench = Bench()
    bench.add("a", PROMPT + whole[:4], Mode.AWAIT, prompt_len=10, outputs=[whole[:4]], max_tokens=9)
    bench.answer()
    bench.load("a", PROMPT + whole[:4], 4, whole[4:5])
    bench.run()

    assert bench.outputs["a", 0] == whole


def test_a_first_token_that_ends_its_sequence_is_told_without_ids():
    bench = Bench(eos_ids=[5])
    bench.add("a", PROMPT, Mode.AWAIT, n=2)
    bench.answer()
    bench.load("a", PROMPT, 0, (5, 6))
    bench.answer()

    assert bench.last("a") == door.TokenEvent("a", 0, 1, (), FinishReason.STOP)
    bench.run()
    assert bench.outputs["a", 0] == [5]
    assert len(bench.outputs["a", 1]) > 1


def test_loading_without_a_token_to_go_on_from_fails_the_job_instead_of_hanging_it():
    bench = Bench()
    bench.add("a", PROMPT, Mode.AWAIT)
    bench.answer()
    bench.load("a", PROMPT, 0, ())
    bench.run()

    assert isinstance(bench.last("a"), door.Failed)
    assert bench.pool.stats.owned == bench.pool.stats.filling == 0


def test_an_awaited_job_that_does_not_fit_is_rejected_at_once_with_both_numbers():
    bench = Bench(blocks=4)
    bench.add("a", PROMPT, Mode.AWAIT)
    bench.add("b", PROMPT, Mode.AWAIT)
    bench.answer()

    assert bench.last("b") == door.Rejected("b", "3 KV blocks are needed and 1 of 4 are available")
    assert isinstance(bench.last("a"), door.Reserved)


# --- ends ---


def test_a_job_larger_than_the_pool_or_the_model_is_rejected_with_both_numbers():
    bench = Bench(blocks=2, max_model_len=12)
    bench.add("pool", PROMPT)
    bench.add("model", [1] * 13, Mode.PREFILL)
    bench.run()

    assert bench.last("pool") == door.Rejected("pool", "10 tokens in 1 sequences need 3 KV blocks; the pool has 2")
    assert bench.last("model") == door.Rejected("model", "13 tokens are over this model's 12")


def test_sequences_that_cannot_decode_side_by_side_in_the_pool_are_rejected():
    bench = Bench(blocks=5)
    bench.add("fits", PROMPT, n=3, max_tokens=3)
    bench.run()
    bench.add("not", PROMPT, n=4, max_tokens=3)
    bench.run()

    assert isinstance(bench.last("fits"), door.Gone)
    assert bench.last("not") == door.Rejected("not", "10 tokens in 4 sequences need 6 KV blocks; the pool has 5")


@pytest.mark.parametrize("mode", [Mode.PREFILL, Mode.LOCAL, Mode.AWAIT])
@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
def test_an_abort_at_any_moment_frees_everything_and_is_answered_once(mode: Mode, rounds: int):
    bench = Bench(chunk_tokens=4)
    bench.add("a", PROMPT, mode, n=2, max_tokens=50)
    for _ in range(rounds):
        bench.step()
    for _ in range(2):
        bench.engine.submit(door.Abort("a"))
    bench.run()

    assert bench.last("a") == door.Gone("a")
    assert bench.pool.stats.owned == bench.pool.stats.filling == 0
    assert not bench.engine.has_work


def test_one_sequence_may_be_aborted_and_the_others_go_on():
    bench = Bench()
    bench.add("a", PROMPT, n=3, max_tokens=8)
    bench.step()
    bench.step()
    for _ in range(2):
        bench.engine.submit(door.Abort("a", 0))
    bench.run()

    assert len(bench.outputs["a", 0]) == 2
    assert [len(bench.outputs["a", number]) for number in (1, 2)] == [8, 8]
    assert bench.outputs["a", 2] == reference(PROMPT, 102, 8)
    assert bench.of("a", door.Gone) == [door.Gone("a")]


def test_a_sequence_aborted_while_its_prompt_is_computed_is_never_sampled():
    bench = Bench(chunk_tokens=4)
    bench.add("a", PROMPT, n=2, max_tokens=5)
    bench.step()
    bench.engine.submit(door.Abort("a", 0))
    bench.run()

    assert bench.outputs["a", 0] == []
    assert bench.outputs["a", 1] == reference(PROMPT, 101, 5)
    assert max(len(row.samples) for batch in bench.runner.batches for row in batch.rows) == 1


@pytest.mark.parametrize("mode", [Mode.LOCAL, Mode.AWAIT])
def test_aborting_the_last_sequence_ends_the_job(mode: Mode):
    bench = Bench()
    bench.add("a", PROMPT, mode, n=2)
    bench.answer()
    for number in (0, 1):
        bench.engine.submit(door.Abort("a", number))
    bench.run()

    assert bench.last("a") == door.Gone("a")
    assert bench.pool.stats.free == bench.pool.total


def test_commands_for_a_job_that_is_not_there_are_dropped():
    bench = Bench()
    for command in (door.Abort("x"), door.Release("x"), door.Loaded("x", 0, (1,)), door.Abort("x", 2)):
        bench.engine.submit(command)
    bench.run()

    assert not bench.events


def test_the_same_key_again_does_not_disturb_the_job_that_has_it():
    bench = Bench()
    bench.add("a", PROMPT, max_tokens=4)
    bench.add("a", PROMPT, max_tokens=4)
    bench.run()

    assert bench.outputs["a", 0] == reference(PROMPT, 100, 4)
    assert len(bench.of("a", door.Gone)) == 1


def test_a_row_that_makes_the_model_raise_fails_its_job_alone():
    bench = Bench()
    bench.add("good", PROMPT, max_tokens=6)
    bench.add("n", [*PROMPT, 3], n=2, max_tokens=6)
    bench.step()
    bench.runner.raises_on = {300}
    bench.add("bad", [300, 2], max_tokens=6)
    bench.add("other", [7, 8], max_tokens=6)
    bench.run()

    assert bench.of("bad", door.TokenEvent) == []
    assert bench.last("bad") == door.Failed("bad", "RuntimeError: bad id")
    assert bench.outputs["good", 0] == reference(PROMPT, 100, 6)
    assert bench.outputs["n", 1] == reference([*PROMPT, 3], 101, 6)
    assert bench.outputs["other", 0] == reference([7, 8], 100, 6)
    assert bench.pool.stats.owned == bench.pool.stats.filling == 0


def test_a_job_of_which_several_rows_raise_fails_once():
    bench = Bench()
    bench.add("a", PROMPT, n=3, max_tokens=9)
    bench.step()
    bench.step()
    bench.runner.raises_on = {bench.outputs["a", number][-1] for number in (0, 2)}
    bench.run()

    assert bench.of("a", door.Failed) == [door.Failed("a", "RuntimeError: bad id")]
    assert bench.pool.stats.owned == bench.pool.stats.filling == 0


def test_a_job_whose_only_row_raises_fails_and_the_engine_lives():
    bench = Bench()
    bench.runner.raises_on = {300}
    bench.add("bad", [300], max_tokens=6)
    bench.run()
    bench.add("next", [1], max_tokens=2)
    bench.run()

    assert bench.last("bad") == door.Failed("bad", "RuntimeError: bad id")
    assert bench.outputs["next", 0] == reference([1], 100, 2)


def test_commands_wait_while_a_step_is_under_way():
    bench = Bench()
    bench.add("a", PROMPT)
    batch = bench.engine.begin()
    assert batch is not None
    bench.engine.submit(door.Abort("a"))
    with pytest.raises(EngineFailed, match="under way"):
        bench.engine.answer()
    assert bench.pool.state(batch.rows[0].tables[0][0]) is BlockState.FILLING


def test_finish_needs_a_step_under_way():
    bench = Bench()
    with pytest.raises(EngineFailed, match="without begin"):
        bench.engine.finish(Execution(StepOutput((), ())))
