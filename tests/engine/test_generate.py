"""The whole engine on real models against `transformers.generate`: the same tokens, however the work is cut."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from splitserve.engine.loader import LoadedModel
from splitserve.protocol.params import SamplingParams
from support.reference import CLOSE_CALL, NEW_TOKENS, Reference, references
from support.torch_engines import Answer, answers, engine_over, load

GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, logprobs=5, ignore_eos=True)


@dataclass(frozen=True)
class Case:
    loaded: LoadedModel
    references: tuple[Reference, ...]

    def short(self) -> tuple[Reference, ...]:
        return tuple(reference for reference in self.references if len(reference.prompt) <= 24)


@pytest.fixture(scope="module")
def smollm2(smollm2_folder: Path, run_folder: Path) -> Case:
    return Case(load(smollm2_folder), references(smollm2_folder, run_folder))


@pytest.fixture(scope="module")
def gemma3(gemma3_folder: Path, run_folder: Path) -> Case:
    return Case(load(gemma3_folder), references(gemma3_folder, run_folder))


def _compare(references: tuple[Reference, ...], got: list[Answer]) -> None:
    """Equal ids and log-probabilities within 1e-3; a token may differ only at a close call, and then what follows too."""
    for reference, answer in zip(references, got, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(reference.ids, answer.ids)) if a != b), NEW_TOKENS)
        assert len(answer.ids) == NEW_TOKENS
        if same < NEW_TOKENS:
            gap = reference.gaps[same]
            assert gap < CLOSE_CALL, f"prompt of {len(reference.prompt)} tokens differs at token {same}, gap {gap:.2g}"
            print(json.dumps({"close call": same, "prompt": len(reference.prompt), "gap": gap}))
        for mine, theirs in zip(answer.logprobs[:same], reference.logprobs):
            assert mine.logprob == pytest.approx(theirs, abs=1e-3)
            assert mine.rank == 1
            assert mine.top[0][1] == mine.logprob
            assert len(mine.top) == 5


@pytest.mark.model
class TestSmolLM2:
    def test_there_are_forty_prompts_of_1_to_2000_tokens(self, smollm2: Case) -> None:
        lengths = sorted(len(reference.prompt) for reference in smollm2.references)
        assert len(lengths) >= 40
        assert (lengths[0], lengths[-1]) == (1, 2000)

    def test_all_prompts_at_once_in_chunks_of_64_and_again_from_the_prefix_cache_answer_as_generate(
        self, smollm2: Case
    ) -> None:
        engine = engine_over(smollm2.loaded, chunk=64)
        prompts = [reference.prompt for reference in smollm2.references]
        first = answers(engine, prompts, GREEDY)
        _compare(smollm2.references, first)
        assert not any(answer.cached_tokens for answer in first)
        again = answers(engine, prompts, GREEDY)
        _compare(smollm2.references, again)
        assert [answer.cached_tokens for answer in again] == [(len(prompt) - 1) // 16 * 16 for prompt in prompts]

    def test_each_prompt_alone_and_whole_answers_as_generate(self, smollm2: Case) -> None:
        engine = engine_over(smollm2.loaded, chunk=2048, prefix_caching=False)
        got = [answers(engine, [reference.prompt], GREEDY)[0] for reference in smollm2.references]
        _compare(smollm2.references, got)

    def test_prompts_read_a_token_at_a_time_answer_as_generate(self, smollm2: Case) -> None:
        engine = engine_over(smollm2.loaded, chunk=1, prefix_caching=False)
        short = smollm2.short()[:8]
        _compare(short, answers(engine, [reference.prompt for reference in short], GREEDY))


@pytest.mark.model
@pytest.mark.slow
class TestGemma3:
    def test_all_prompts_at_once_in_chunks_of_64_answer_as_generate(self, gemma3: Case) -> None:
        engine = engine_over(gemma3.loaded, chunk=64, prefix_caching=False)
        _compare(gemma3.references, answers(engine, [reference.prompt for reference in gemma3.references], GREEDY))

    def test_all_prompts_at_once_and_whole_and_the_long_again_from_the_prefix_cache_answer_as_generate(
        self, gemma3: Case
    ) -> None:
        engine = engine_over(gemma3.loaded, chunk=2048)
        _compare(gemma3.references, answers(engine, [reference.prompt for reference in gemma3.references], GREEDY))
        long = tuple(reference for reference in gemma3.references if len(reference.prompt) > 64)
        again = answers(engine, [reference.prompt for reference in long], GREEDY)
        _compare(long, again)
        assert all(answer.cached_tokens for answer in again)
