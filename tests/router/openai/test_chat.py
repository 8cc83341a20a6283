"""`/v1/chat/completions` as the official client sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from splitserve.errors import Overloaded, RequestFailed
from splitserve.model.facts import GenerationDefaults
from splitserve.protocol.states import FinishReason
from splitserve.router.generation import Done, GenerationEvent, Tokens
from support.generation import (
    EOS,
    MODEL,
    TEMPLATE,
    Play,
    ScriptedGeneration,
    ScriptedGenerator,
    facts,
    in_process,
    prompt_text,
    says,
    silent,
)

HELLO: Any = [{"role": "user", "content": "Hello"}]


def client(http: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url="http://router/v1", api_key="k", max_retries=0, http_client=http)


async def chat(play: Play, *, messages: Any = HELLO, parts: dict[str, Any] | None = None, **fields: Any) -> Any:
    """One whole answer and the submission behind it."""
    generator = ScriptedGenerator(play)
    async with in_process(generator, **(parts or {})) as http, client(http) as api:
        answer: Any = await api.chat.completions.create(model=MODEL, messages=messages, **fields)
    return answer, generator.submitted[0].submission


async def stream(play: Play, **fields: Any) -> list[Any]:
    async with in_process(ScriptedGenerator(play)) as http, client(http) as api:
        chunks: Any = await api.chat.completions.create(model=MODEL, messages=HELLO, stream=True, **fields)
        return [chunk async for chunk in chunks]


async def test_a_whole_answer_has_text_reason_and_usage():
    answer, submission = await chat(says("Hi there, Köln 👋"))
    assert answer.choices[0].message.content == "Hi there, Köln 👋"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.model, answer.id, answer.object) == (MODEL, submission.rid, "chat.completion")
    assert answer.usage.prompt_tokens == len("<user>Hello<a>")
    assert answer.usage.completion_tokens == len("Hi there, Köln 👋".encode()) + 1
    assert answer.usage.prompt_tokens_details.cached_tokens == 4


async def test_a_stream_opens_with_the_role_and_ends_with_reason_and_usage():
    chunks = await stream(says("Köln 👋"), stream_options={"include_usage": True})
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len("Köln 👋".encode()) + 1
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 4
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert "".join(chunk.choices[0].delta.content for chunk in chunks[:-1]) == "Köln 👋"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == ["stop"]
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1


async def test_usage_comes_with_every_chunk_when_asked_for():
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await stream(says("abc", piece=1), stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts[-1] == 4
    assert counts == sorted(counts)


async def test_a_stream_without_options_has_no_usage():
    chunks = await stream(says("abc"))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


async def test_several_answers_keep_their_index_and_have_seeds_of_their_own():
    answer, submission = await chat(says("abc"), n=3, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert submission.seeds == (7, 8, 9)
    chunks = await stream(says("abc"), n=3)
    assert [chunk.choices[0].index for chunk in chunks if chunk.choices[0].delta.role] == [0, 1, 2]
    for index in range(3):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.delta.content for choice in own) == "abc"
        assert [choice.finish_reason for choice in own if choice.finish_reason] == ["stop"]


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_stop_string_ends_the_answer_and_nothing_of_it_is_shown(streamed: bool):
    generator = ScriptedGenerator(says("one two three", piece=2))
    async with in_process(generator) as http, client(http) as api:
        if streamed:
            chunks: Any = await api.chat.completions.create(
                model=MODEL, messages=HELLO, stop=["o t"], stream=True, stream_options={"include_usage": True}
            )
            got = [chunk async for chunk in chunks]
            text = "".join(chunk.choices[0].delta.content for chunk in got[:-1])
            reasons = [chunk.choices[0].finish_reason for chunk in got[:-1] if chunk.choices[0].finish_reason]
            usage = got[-1].usage
        else:
            answer = await api.chat.completions.create(model=MODEL, messages=HELLO, stop=["o t"])
            text, reasons, usage = answer.choices[0].message.content, [answer.choices[0].finish_reason], answer.usage
    assert text == "one tw"
    assert reasons == ["stop"]
    assert usage is not None
    assert usage.completion_tokens == len("one two t")
    assert generator.submitted[0].stopped == [0]


async def test_the_stop_string_is_part_of_the_answer_when_asked_for():
    answer, _ = await chat(says("one two"), stop="tw", extra_body={"include_stop_str_in_output": True})
    assert answer.choices[0].message.content == "one tw"
    assert answer.choices[0].stop_reason == "tw"


async def test_a_stop_token_is_named_and_has_no_text():
    play = says("abc", eos=False)
    answer, submission = await chat(play, extra_body={"stop_token_ids": [ord("c")]})
    assert submission.params.stop_token_ids == (ord("c"), EOS)
    assert answer.choices[0].message.content == "ab"
    assert answer.choices[0].stop_reason == ord("c")


async def test_an_answer_at_its_length_says_so():
    answer, submission = await chat(says("abcdef", reason=FinishReason.LENGTH), max_completion_tokens=3, max_tokens=9)
    assert submission.params.max_tokens == 3
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content == "abc"
    assert answer.usage.completion_tokens == 3


async def test_logprobs_have_the_tokens_bytes_and_the_best_alternatives():
    answer, submission = await chat(says("é"), logprobs=True, top_logprobs=2)
    assert submission.params.logprobs == 2
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in content) == "é</s>".encode()
    assert content[-1].token == "</s>"
    assert [top.logprob for top in content[0].top_logprobs] == [-0.5, -1.5]
    assert content[0].top_logprobs[0].bytes == content[0].bytes == [0xC3]


async def test_streamed_logprobs_are_those_of_the_whole_answer():
    whole, _ = await chat(says("abc"), logprobs=True, top_logprobs=1)
    chunks = await stream(says("abc"), logprobs=True, top_logprobs=1)
    parts = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert parts == whole.choices[0].logprobs.content


async def test_content_parts_null_content_names_and_tool_messages_are_taken():
    messages = [
        {"role": "developer", "content": "Be brief.", "name": "boss"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    _, submission = await chat(says("ok"), messages=messages)
    assert prompt_text(submission.ids) == "<system>Be brief.<user>a\nb<assistant><tool>42<a>"


async def test_a_template_that_knows_developers_gets_them():
    known = {"facts": facts(chat_templates={"default": TEMPLATE + "{# developer #}"})}
    _, submission = await chat(says("ok"), messages=[{"role": "developer", "content": "x"}], parts=known)
    assert prompt_text(submission.ids) == "<developer>x<a>"


async def test_arguments_of_tool_calls_reach_the_template_as_objects():
    template = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments.city }}{% endfor %}{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Köln"}'}}
    _, submission = await chat(
        says("ok"),
        messages=[{"role": "assistant", "content": "", "tool_calls": [call]}],
        parts={"facts": facts(chat_templates={"default": template})},
    )
    assert prompt_text(submission.ids) == "Köln"


async def test_tools_that_may_not_be_called_are_shown_to_the_template():
    template = "{{ tools | tojson }}{{ mood }}"
    tool = {"type": "function", "function": {"name": "f"}}
    _, submission = await chat(
        says("ok"),
        tools=[tool],
        tool_choice="none",
        extra_body={"chat_template_kwargs": {"mood": "!"}},
        parts={"facts": facts(chat_templates={"default": template})},
    )
    assert prompt_text(submission.ids) == '[{"type": "function", "function": {"name": "f"}}]!'


async def test_the_last_message_can_be_continued():
    messages = [*HELLO, {"role": "assistant", "content": "The answer is"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    _, submission = await chat(says("ok"), messages=messages, extra_body=extra)
    assert prompt_text(submission.ids) == "<user>Hello<assistant>The answer is"


async def test_open_fields_take_the_models_defaults_and_given_zeros_do_not():
    defaults = GenerationDefaults(temperature=0.6, top_k=40, top_p=0.9, max_tokens=50)
    known = {"facts": facts(defaults=defaults)}
    _, submission = await chat(says("ok"), parts=known)
    params = submission.params
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.6, 40, 0.9, 50)
    _, submission = await chat(says("ok"), parts=known, temperature=0, extra_body={"top_k": 0, "min_p": 0})
    assert (submission.params.temperature, submission.params.top_k) == (0.0, 0)


async def test_every_sampling_field_reaches_the_workers():
    _, submission = await chat(
        says("ok"),
        temperature=0.5,
        top_p=0.8,
        presence_penalty=-1,
        frequency_penalty=1.5,
        logit_bias={"7": -100, "3": 2.5},
        seed=-5,
        extra_body={"top_k": 9, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True, "min_tokens": 2, "priority": 3, "cache_salt": "s"},
    )  # fmt: skip
    params = submission.params
    assert (params.temperature, params.top_p, params.presence_penalty, params.frequency_penalty) == (0.5, 0.8, -1, 1.5)
    assert params.logit_bias == ((3, 2.5), (7, -100.0))
    assert (params.top_k, params.min_p, params.repetition_penalty) == (9, 0.1, 1.2)
    assert (params.ignore_eos, params.min_tokens, params.stop_token_ids) == (True, 2, ())
    assert submission.seeds == ((1 << 64) - 5,)
    assert (submission.priority, submission.cache_salt) == (3, "s")
    assert submission.params.max_tokens == 512 - len(submission.ids)


async def test_a_seed_is_drawn_for_each_answer_when_none_is_given():
    numbers = iter([5, 6])
    _, submission = await chat(says("ok"), n=2, parts={"draw_seed": lambda: next(numbers)})
    assert submission.seeds == (5, 6)


async def test_a_model_without_a_template_says_so():
    with pytest.raises(openai.BadRequestError, match="no chat template") as caught:
        await chat(says("ok"), parts={"facts": facts(chat_templates={})})
    assert caught.value.param == "messages"


async def failing(generation: ScriptedGeneration) -> AsyncIterator[GenerationEvent]:
    yield Tokens(0, 0, tuple(b"ab"))
    yield Done(RequestFailed("too many workers died"))


async def failing_at_once(generation: ScriptedGeneration) -> AsyncIterator[GenerationEvent]:
    yield Done(Overloaded("waited 30 s for a worker", retry_after_s=2.5))


async def test_an_error_after_the_first_token_comes_as_an_event():
    seen: list[Any] = []

    async def read() -> None:
        async with in_process(ScriptedGenerator(failing)) as http, client(http) as api:
            chunks: Any = await api.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
            async for chunk in chunks:
                seen.append(chunk)

    with pytest.raises(openai.APIError, match="too many workers died"):
        await read()
    assert "".join(chunk.choices[0].delta.content for chunk in seen) == "ab"


async def test_an_error_of_a_whole_answer_has_its_status():
    with pytest.raises(openai.InternalServerError, match="too many workers died"):
        await chat(failing)


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_error_before_the_first_token_has_its_own_status(streamed: bool):
    with pytest.raises(openai.RateLimitError, match="waited 30 s") as caught:
        await chat(failing_at_once, stream=streamed)
    assert caught.value.response.headers["retry-after"] == "3"


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_fault_of_ours_is_a_500_with_an_error_body_and_a_traceback_in_the_log(
    streamed: bool, caplog: pytest.LogCaptureFixture
):
    generator = ScriptedGenerator(silent)
    generator.refuse = ZeroDivisionError()
    async with in_process(generator) as http, client(http) as api:
        with pytest.raises(openai.InternalServerError) as caught:
            await api.chat.completions.create(model=MODEL, messages=HELLO, stream=streamed)
    assert caught.value.code == "internal_error"
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("streamed", [False, True])
async def test_usage_tells_where_the_time_went_when_asked_for(streamed: bool):
    asked = {"include_stage_seconds": True}
    if streamed:
        usage = (await stream(says("abc"), extra_body=asked))[-1].usage
    else:
        usage = (await chat(says("abc"), extra_body=asked))[0].usage
    stages = usage.stage_seconds
    assert stages["prefill"] == 0.1
    assert sum(seconds for stage, seconds in stages.items() if stage != "ttft") == pytest.approx(
        stages["ttft"], abs=1e-5
    )
    assert "first_gap" not in stages


async def test_usage_tells_no_stages_to_who_did_not_ask():
    answer, submission = await chat(says("abc"))
    assert not hasattr(answer.usage, "stage_seconds")
    assert submission.tokenise_s > 0
