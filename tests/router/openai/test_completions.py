"""`/v1/completions`: prompts in all shapes, logprobs in the old format."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from splitserve.protocol.states import FinishReason
from support.generation import MODEL, Play, ScriptedGenerator, in_process, prompt_text, says


def client(http: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url="http://router/v1", api_key="k", max_retries=0, http_client=http)


async def complete(play: Play, prompt: Any, **fields: Any) -> tuple[Any, list[Any]]:
    """An answer (its chunks when streamed), and the submissions behind it."""
    generator = ScriptedGenerator(play)
    async with in_process(generator) as http, client(http) as api:
        answer: Any = await api.completions.create(model=MODEL, prompt=prompt, **fields)
        if fields.get("stream"):
            answer = [chunk async for chunk in answer]
    return answer, [generation.submission for generation in generator.submitted]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("one", ["one"]),
        (["one", "two"], ["one", "two"]),
        (list(b"one"), ["one"]),
        ([list(b"one"), list(b"two")], ["one", "two"]),
        (["one", list(b"two")], ["one", "two"]),
    ],
)
async def test_prompts_are_taken_in_every_shape(prompt: Any, texts: list[str]):
    answer, submissions = await complete(says("ok"), prompt)
    assert [prompt_text(submission.ids) for submission in submissions] == texts
    assert [choice.index for choice in answer.choices] == list(range(len(texts)))
    assert {choice.text for choice in answer.choices} == {"ok"}
    assert answer.usage.prompt_tokens == 3 * len(texts)
    assert answer.usage.completion_tokens == 3 * len(texts)
    assert answer.usage.prompt_tokens_details.cached_tokens == 4 * len(texts)


async def test_each_prompt_of_a_list_is_a_request_of_its_own_under_one_answer():
    answer, submissions = await complete(says("ok"), ["a", "b"], n=2, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [submission.rid for submission in submissions] == [answer.id, f"{answer.id}-1"]
    assert [submission.seeds for submission in submissions] == [(1, 2), (1, 2)]


async def test_a_stream_of_several_prompts_ends_each_choice_once():
    chunks, _ = await complete(says("abc"), ["a", "b"], n=2, stream=True, stream_options={"include_usage": True})
    for index in range(4):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert "".join(choice.text for choice in own) == "abc"
        assert [choice.finish_reason for choice in own if choice.finish_reason] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 16


async def test_logprobs_have_offsets_into_the_text():
    answer, submissions = await complete(says("aé", eos=False), "x", logprobs=1)
    assert submissions[0].params.logprobs == 1
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text == "aé"
    assert logprobs.text_offset == [0, 1, 1]
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.tokens == ["a", "\ufffd", "\ufffd"]
    assert logprobs.top_logprobs[0] == {"a": -0.5}


async def test_the_chosen_token_stands_among_the_best_even_when_none_is_asked_for():
    answer, _ = await complete(says("a", eos=False), "x", logprobs=0)
    assert answer.choices[0].logprobs.top_logprobs == [{"a": -0.5}]


@pytest.mark.parametrize(("fields", "most"), [({}, 16), ({"max_tokens": 40}, 40), ({"max_tokens": None}, 511)])
async def test_max_tokens_is_16_unless_given_and_null_is_the_rest_of_the_context(fields: dict[str, Any], most: int):
    _, submissions = await complete(says("ok"), "x", **fields)
    assert submissions[0].params.max_tokens == most


async def test_the_default_of_16_shrinks_to_the_room_that_is_left():
    _, submissions = await complete(says("ok"), "x" * 505)
    assert submissions[0].params.max_tokens == 7


async def test_defaults_spelled_out_change_nothing():
    fields: dict[str, Any] = {"suffix": None, "best_of": 1, "echo": False, "user": "me", "n": 1, "seed": None}
    answer, _ = await complete(says("ok", reason=FinishReason.LENGTH), "x", **fields)
    assert answer.choices[0].finish_reason == "length"


async def test_special_tokens_can_be_shown():
    answer, _ = await complete(says(b"a", eos=True), "x", extra_body={"skip_special_tokens": False, "ignore_eos": True})
    assert answer.choices[0].text == "a</s>"
