"""The official `openai` client against a running cluster."""

from __future__ import annotations

import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError

from support.cluster import Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.model]

HELLO = [{"role": "user", "content": "Say hello to the sea."}]


async def test_a_chat_answer_is_whole_and_counts_its_tokens(pair: Cluster, client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=pair.model, messages=HELLO, max_tokens=16, temperature=0)  # type: ignore[arg-type]
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_a_stream_adds_up_to_the_whole_answer(pair: Cluster, client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model=pair.model, messages=HELLO, max_tokens=16, temperature=0)  # type: ignore[arg-type]
    stream = await client.chat.completions.create(
        model=pair.model,
        messages=HELLO,  # type: ignore[arg-type]
        max_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage
    assert whole.usage
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


async def test_n_answers_of_one_prompt_are_n_choices_that_were_prefilled_once(
    pair: Cluster, client: AsyncOpenAI
) -> None:
    before = await pair.total("splitserve_prefill_tokens_total", "prefill")
    answer = await client.completions.create(
        model=pair.model, prompt="Ten words about n answers of one prompt:", n=3, max_tokens=12, temperature=1.0, seed=5
    )
    after = await pair.total("splitserve_prefill_tokens_total", "prefill")
    assert sorted(choice.index for choice in answer.choices) == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) > 1
    assert answer.usage
    assert after - before == answer.usage.prompt_tokens


async def test_a_list_of_prompts_is_answered_in_order(pair: Cluster, client: AsyncOpenAI) -> None:
    prompts = ["The sun is", "The moon is", "The sea is"]
    together = await client.completions.create(model=pair.model, prompt=prompts, max_tokens=6, temperature=0)
    apart = [
        await client.completions.create(model=pair.model, prompt=prompt, max_tokens=6, temperature=0)
        for prompt in prompts
    ]
    assert [c.text for c in sorted(together.choices, key=lambda c: c.index)] == [a.choices[0].text for a in apart]


async def test_a_stop_string_ends_the_answer_before_it(pair: Cluster, client: AsyncOpenAI) -> None:
    whole = await client.completions.create(model=pair.model, prompt="Count: 1, 2, 3,", max_tokens=24, temperature=0)
    text = whole.choices[0].text
    stop = text[6:9]
    stopped = await client.completions.create(
        model=pair.model, prompt="Count: 1, 2, 3,", max_tokens=24, temperature=0, stop=[stop]
    )
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


async def test_models_are_listed_by_the_name_that_clients_use(pair: Cluster, client: AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [pair.model]
    assert (await client.models.retrieve(pair.model)).id == pair.model


async def test_an_unknown_model_is_not_found(client: AsyncOpenAI) -> None:
    with pytest.raises(NotFoundError, match="gpt-9"):
        await client.completions.create(model="gpt-9", prompt="x")


async def test_a_prompt_over_the_context_says_both_numbers(pair: Cluster, client: AsyncOpenAI) -> None:
    with pytest.raises(BadRequestError, match=r"this model's maximum context length is \d+ tokens.*\d+"):
        await client.completions.create(model=pair.model, prompt=[5] * 20_000, max_tokens=5)


async def test_a_field_out_of_range_is_named(pair: Cluster, client: AsyncOpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        await client.completions.create(model=pair.model, prompt="x", temperature=-1)
    assert caught.value.param == "temperature"
