"""What comes out of a split cluster is what `transformers.generate` gives in float32, however it was cut and moved."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from openai import AsyncOpenAI
from openai.types import Completion
from tokenizers import Tokenizer

from support.cluster import Cluster
from support.reference import CLOSE_CALL, NEW_TOKENS, Reference, references

pytestmark = [pytest.mark.e2e, pytest.mark.model]


@pytest.fixture(scope="module")
def expected(smollm2_folder: Path, run_folder: Path) -> tuple[Reference, ...]:
    return references(smollm2_folder, run_folder)


@pytest.fixture(scope="module")
def tokenizer(smollm2_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))


async def complete(client: AsyncOpenAI, model: str, reference: Reference) -> Completion:
    return await client.completions.create(
        model=model,
        prompt=reference.prompt,
        max_tokens=NEW_TOKENS,
        temperature=0,
        logprobs=1,
        extra_body={"ignore_eos": True, "skip_special_tokens": False, "repetition_penalty": 1.0, "top_p": 1.0},
    )


def compare(tokenizer: Tokenizer, expected: Sequence[Reference], got: Sequence[Completion]) -> None:
    """Equal text and log-probabilities within 1e-3, up to a close call of float32 rounding, which is shown."""
    for reference, completion in zip(expected, got, strict=True):
        choice = completion.choices[0]
        assert choice.logprobs
        mine = choice.logprobs.token_logprobs or []
        assert len(mine) == NEW_TOKENS
        assert completion.usage
        assert completion.usage.prompt_tokens == len(reference.prompt)
        if choice.text == tokenizer.decode(reference.ids, skip_special_tokens=False):
            assert mine == pytest.approx(reference.logprobs, abs=1e-3)
            continue
        at = next(i for i, (a, b) in enumerate(zip(mine, reference.logprobs)) if abs((a or 0) - b) > 1e-3)
        gap = min(reference.gaps[: at + 1])
        assert gap < CLOSE_CALL, (
            f"a prompt of {len(reference.prompt)} tokens differs by token {at}; least gap {gap:.2g}"
        )
        print(f"close call: prompt of {len(reference.prompt)} tokens, token {at}, gap {gap:.2g}")


@pytest.fixture(scope="module")
def heard_once() -> list[Completion]:
    """What `alone` heard: whichever test is first has every prompt read, and leaves it in the prefix cache."""
    return []


@pytest.fixture
async def alone(
    pair: Cluster, client: AsyncOpenAI, expected: tuple[Reference, ...], heard_once: list[Completion]
) -> list[Completion]:
    """The answers to all prompts, one after the other, when `pair` met them for the first time."""
    if not heard_once:
        heard_once.extend([await complete(client, pair.model, reference) for reference in expected])
    return heard_once


async def test_each_prompt_alone_over_shared_memory_answers_as_generate(
    alone: list[Completion], expected: tuple[Reference, ...], tokenizer: Tokenizer
) -> None:
    compare(tokenizer, expected, alone)


async def test_all_prompts_at_once_over_tcp_on_two_pairs_answer_as_generate(
    four: Cluster, expected: tuple[Reference, ...], tokenizer: Tokenizer
) -> None:
    async with AsyncOpenAI(base_url=f"{four.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        got = await asyncio.gather(*(complete(client, four.model, reference) for reference in expected))
    compare(tokenizer, expected, got)


@pytest.mark.usefixtures("alone")
async def test_prompts_met_again_answer_the_same_from_the_prefix_cache(
    pair: Cluster, client: AsyncOpenAI, expected: tuple[Reference, ...], tokenizer: Tokenizer
) -> None:
    long = [reference for reference in expected if len(reference.prompt) > 64]
    again = [await complete(client, pair.model, reference) for reference in long]
    compare(tokenizer, long, again)
    for reference, completion in zip(long, again, strict=True):
        assert completion.usage
        details = completion.usage.prompt_tokens_details
        assert details
        assert details.cached_tokens == (len(reference.prompt) - 1) // 16 * 16


async def test_the_same_seed_gives_the_same_text_whatever_else_is_in_the_batch(
    pair: Cluster, client: AsyncOpenAI
) -> None:
    async def sample(seed: int) -> str:
        answer = await client.completions.create(
            model=pair.model, prompt="Once upon a time", max_tokens=24, temperature=0.9, top_p=0.9, seed=seed
        )
        return answer.choices[0].text

    alone = await sample(7)
    crowd = await asyncio.gather(sample(7), *(sample(seed) for seed in range(100, 107)))
    assert crowd[0] == alone
    assert len(set(crowd)) > 1
