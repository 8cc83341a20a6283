"""Steps by hand: what a runner writes, keeps and samples; and what a model may have of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from splitserve.config import EngineSettings
from splitserve.engine import door
from splitserve.engine.batch import SampleRow, StepBatch, StepRow
from splitserve.engine.build import build_engine, build_runner, chunk_tokens
from splitserve.engine.engine import Engine
from splitserve.engine.loader import LoadedModel, pool_blocks, served_context
from splitserve.errors import NotEnoughMemory
from splitserve.kv.segment import Segment
from splitserve.protocol.params import SamplingParams
from support.tiny_models import ADMITTED, CONTEXT, save_model
from support.torch_engines import answers, engine_over, load

PROMPT = [7, 30, 41, 8, 9, 60, 11, 12, 80, 14, 15, 5, 17, 18, 19, 50, 21, 22, 90, 24]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
WARM = replace(GREEDY, temperature=1.2, top_p=0.95, max_tokens=10)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("llama")
    save_model(ADMITTED["llama"](), folder)
    return load(folder)


def _sample(ids: list[int], seed: int = 1, index: int = 0, params: SamplingParams = GREEDY) -> SampleRow:
    return SampleRow(params, seed, index, len(ids), ids)


def test_a_step_without_samples_writes_kv_and_gives_no_ids(loaded: LoadedModel) -> None:
    runner = build_runner(loaded, 8)
    first = runner.execute(StepBatch((StepRow(PROMPT[:9], 0, [[3, 5]]),), 0))
    assert first.ids == ()
    second = runner.execute(StepBatch((StepRow(PROMPT[9:], 9, [[3, 5]], (_sample(PROMPT),)),), 0))
    whole = build_runner(loaded, 8).execute(StepBatch((StepRow(PROMPT, 0, [[0, 1]], (_sample(PROMPT),)),), 0))
    assert second.ids == whole.ids


def test_samples_come_in_the_order_of_the_rows_and_several_may_share_one_row(loaded: LoadedModel) -> None:
    params = replace(WARM, logprobs=0)
    runner = build_runner(loaded, 16)
    fan = tuple(_sample(PROMPT, seed, params=params) for seed in (3, 4, 5))
    rows = (
        StepRow([PROMPT[0]], 0, [[0]], (_sample(PROMPT[:1]),)),
        StepRow(PROMPT[:5], 0, [[1]]),
        StepRow(PROMPT, 0, [[2, 3]], fan),
        StepRow(PROMPT[:3], 0, [[4]], (_sample(PROMPT[:3]),)),
    )
    together = runner.execute(StepBatch(rows, 1))
    alone = [build_runner(loaded, 16).execute(StepBatch((replace(row),), 0)) for row in rows]
    assert together.ids == tuple(token for output in alone for token in output.ids)
    assert [logprob is not None for logprob in together.logprobs] == [False, True, True, True, False]


def test_a_row_run_twice_gives_the_same_token(loaded: LoadedModel) -> None:
    runner = build_runner(loaded, 8)
    batch = StepBatch((StepRow(PROMPT, 0, [[3, 5]], (_sample(PROMPT, params=WARM),)),), 0)
    assert runner.execute(batch) == runner.execute(batch)


def test_kv_read_from_another_engines_blocks_decodes_to_the_same_answer(loaded: LoadedModel) -> None:
    """Prefill in one engine, decode in another, the bytes of the blocks moved as a transport would."""
    size = loaded.layout.block_bytes
    prefill, decode = (Segment.create(12, size, loaded.layout.digest, life) for life in (1, 2))
    try:
        first, second = _over(loaded, prefill, "prefill"), _over(loaded, decode, "decode")
        second.submit(door.Add("k", door.Mode.AWAIT, tuple(PROMPT), len(PROMPT), ((),), GREEDY, (1,)))
        first.submit(door.Add("k", door.Mode.PREFILL, tuple(PROMPT), len(PROMPT), ((),), GREEDY, (1,)))
        reserved = _event(second, door.Reserved)
        ready = _event(first, door.Prefilled)
        for source, target in zip(ready.groups[0].blocks, reserved.groups[0], strict=True):
            decode.pool[target * size : (target + 1) * size] = prefill.pool[source * size : (source + 1) * size]
        second.submit(door.Loaded("k", ready.index, ready.first_ids))
        ids = [*ready.first_ids]
        computed = 0
        while second.has_work:
            batch = second.step()
            assert batch is not None
            computed += batch.stats.prefill_tokens if batch.stats else 0
            ids += [token for event in batch.events if isinstance(event, door.TokenEvent) for token in event.ids]
        assert ids == answers(engine_over(loaded, chunk=64), [PROMPT], GREEDY)[0].ids
        assert computed == 0
    finally:
        prefill.close()
        decode.close()


def _over(loaded: LoadedModel, segment: Segment, role: Any) -> Engine:
    return build_engine(loaded, segment.pool, segment.generations, 12, EngineSettings(), role, time.monotonic)


def _event(engine: Engine, kind: Callable[..., Any]) -> Any:
    while True:
        batch = engine.step()
        assert batch is not None, "the engine came to rest without it"
        for event in batch.events:
            if type(event) is kind:
                return event


def test_the_same_seed_gives_the_same_text_whatever_the_batch_and_the_chunks(loaded: LoadedModel) -> None:
    prompts = [PROMPT[:n] for n in (20, 3, 11, 1, 17)]
    together = [answer.ids for answer in answers(engine_over(loaded, chunk=7), prompts, WARM)]
    for i, prompt in enumerate(prompts):
        assert answers(engine_over(loaded, chunk=64), [prompt], WARM, seed=1 + i)[0].ids == together[i]
    assert len({tuple(ids) for ids in together}) == len(prompts)


def test_a_pool_is_one_gibibyte_or_a_quarter_of_free_memory_on_a_cpu(loaded: LoadedModel) -> None:
    size = loaded.layout.block_bytes
    assert pool_blocks(loaded, EngineSettings(), free=64 << 30) == (1 << 30) // size
    assert pool_blocks(loaded, EngineSettings(), free=400 * size) == 100
    assert pool_blocks(loaded, EngineSettings(kv_cache_memory_bytes=50 * size + 1), free=400 * size) == 50


def test_too_small_a_pool_is_refused_with_its_numbers(loaded: LoadedModel) -> None:
    size = loaded.layout.block_bytes
    with pytest.raises(NotEnoughMemory, match=rf"would get {3 * size} bytes, {CONTEXT} tokens need {9 * size}"):
        pool_blocks(loaded, EngineSettings(), free=12 * size)
    with pytest.raises(NotEnoughMemory, match=rf"asks for {20 * size} bytes, {10 * size} are free"):
        pool_blocks(loaded, EngineSettings(kv_cache_memory_bytes=20 * size), free=10 * size)


def test_a_context_that_was_asked_for_must_fit_the_pool(loaded: LoadedModel) -> None:
    size = loaded.layout.block_bytes
    asked = replace(loaded, max_model_len=4096, context_asked=True)
    with pytest.raises(NotEnoughMemory, match="4096 tokens need"):
        pool_blocks(asked, EngineSettings(), free=4 * 40 * size)
    assert pool_blocks(replace(asked, context_asked=False), EngineSettings(), free=4 * 40 * size) == 40


def test_the_served_context_is_no_longer_than_the_pool(loaded: LoadedModel) -> None:
    assert served_context(loaded, 100) == CONTEXT
    assert served_context(loaded, 5) == 5 * loaded.layout.block_tokens


@pytest.mark.parametrize(
    ("settings", "role", "device", "tokens"),
    [
        ({}, "prefill", "cpu", 512),
        ({}, "prefill", "cuda", 2048),
        ({}, "decode", "cpu", 40),
        ({}, "decode", "cuda", 256),
        ({"max_num_batched_tokens": 100}, "prefill", "cpu", 100),
        ({"max_num_batched_tokens": 100}, "decode", "cpu", 40),
        ({"decode_chunk_tokens": 7}, "decode", "cuda", 7),
    ],
)
def test_the_prefill_budget_of_a_step_depends_on_role_and_device(
    settings: dict[str, int], role: Any, device: str, tokens: int
) -> None:
    assert chunk_tokens(EngineSettings.model_validate(settings), role, device) == tokens


@pytest.mark.parametrize(("role", "name"), [("prefill", "max_num_batched_tokens"), ("decode", "decode_chunk_tokens")])
def test_the_help_names_the_prefill_budgets_that_hold_by_default(role: Any, name: str) -> None:
    on_cpu, on_gpu = (chunk_tokens(EngineSettings(), role, device) for device in ("cpu", "cuda"))
    told = EngineSettings.model_fields[name].description
    assert told is not None
    assert f"0: {on_cpu} on a CPU, {on_gpu} on a GPU" in told
