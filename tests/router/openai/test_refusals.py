"""Everything wrong with a request is a 4xx in OpenAI's format that names the field; nothing is a 422 or a 5xx."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from splitserve.config import HttpSettings
from splitserve.errors import NoWorkers, Overloaded
from splitserve.router.body import field_at
from support.generation import MODEL, ScriptedGenerator, facts, in_process, says

MESSAGES = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@pytest.fixture
async def api() -> AsyncIterator[httpx.AsyncClient]:
    async with in_process(ScriptedGenerator(says("ok"))) as api:
        yield api


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", "5"), ("max_tokens", 1.5), ("max_tokens", True),
        ("max_completion_tokens", 0), ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"),
        ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("top_k", 10**30), ("min_p", -1), ("min_p", 1.5),
        ("presence_penalty", 2.5), ("frequency_penalty", -2.5), ("repetition_penalty", 0), ("n", 0), ("n", 129),
        ("seed", 2**63), ("seed", "x"), ("min_tokens", -1), ("min_tokens", 10**6), ("stop", 5),
        ("stop_token_ids", [258]), ("logit_bias", {"258": 1}), ("logit_bias", {"x": 1}), ("logit_bias", [1]),
        ("top_logprobs", 21), ("logprobs", 5), ("stream", "yes"), ("stream_options", 1), ("ignore_eos", 1),
        ("messages", []), ("messages", "hi"), ("messages", None), ("tools", {}), ("chat_template_kwargs", []),
        ("chat_template", "{{ 1 }}"), ("continue_final_message", True), ("cache_salt", ""), ("model", 7),
        ("chat_template_kwargs.messages", None),
    ],
)  # fmt: skip
async def test_a_value_out_of_range_is_refused_by_its_fields_name(api: httpx.AsyncClient, field: str, value: object):
    body = {"model": MODEL, "messages": MESSAGES, field: value}
    if field == "chat_template_kwargs.messages":
        body = {"messages": MESSAGES, "chat_template_kwargs": {"messages": []}}
    error = refused(await api.post(CHAT, json=body))
    assert error["param"] == field
    assert field.rpartition(".")[2] in error["message"]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"content": "x"}], "messages.0.role"),
        ([{"role": 1, "content": "x"}], "messages.0.role"),
        ([{"role": "user", "content": 5}], "messages.0.content"),
        ([{"role": "user", "content": [5]}], "messages.0.content.0"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages.0.content.0"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text"),
        ([MESSAGES[0], 7], "messages.1"),
        ([{"role": "assistant", "tool_calls": 1}], "messages.0.tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"function": 1}]}], "messages.0.tool_calls.0"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}], "messages.0.tool_calls.0"),
    ],
)
async def test_a_malformed_message_is_refused_by_its_place(api: httpx.AsyncClient, messages: object, param: str):
    assert refused(await api.post(CHAT, json={"messages": messages}))["param"] == param


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (None, "prompt"), ([], "prompt"), ("", "prompt"), (5, "prompt"), ({}, "prompt"), ([[]], "prompt.0"),
        ([1, "a"], "prompt.1"), (["a", 1.5], "prompt.1"), ([258], "prompt.0"), ([-1], "prompt.0"),
        ([[1], [True]], "prompt.1.0"), (["a"] * 1025, "prompt"),
    ],
)  # fmt: skip
async def test_a_malformed_prompt_is_refused_by_its_place(api: httpx.AsyncClient, prompt: object, param: str):
    assert refused(await api.post(COMPLETIONS, json={"prompt": prompt}))["param"] == param


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (CHAT, "response_format", {"type": "json_object"}), (CHAT, "tools", [{"type": "function"}]),
        (CHAT, "tool_choice", "required"), (CHAT, "tool_choice", {"type": "function"}), (CHAT, "audio", {"voice": "x"}),
        (CHAT, "modalities", ["text", "audio"]), (CHAT, "prediction", {}), (CHAT, "use_beam_search", True),
        (CHAT, "prompt_logprobs", 0), (CHAT, "echo", True), (CHAT, "structured_outputs", {"json": {}}),
        (CHAT, "functions", [{}]), (CHAT, "bad_words", ["x"]), (COMPLETIONS, "echo", True), (COMPLETIONS, "suffix", "x"),
        (COMPLETIONS, "best_of", 2), (COMPLETIONS, "prompt_logprobs", 1), (COMPLETIONS, "truncate_prompt_tokens", 5),
    ],
)  # fmt: skip
async def test_a_known_field_that_is_not_served_is_refused_by_name(
    api: httpx.AsyncClient, path: str, field: str, value: object
):
    body = {"messages": MESSAGES, "prompt": "x", field: value}
    error = refused(await api.post(path, json=body))
    assert (error["param"], error["code"]) == (field, "unsupported_value")


async def test_known_fields_at_their_defaults_and_null_change_nothing(api: httpx.AsyncClient):
    neutral = {
        "response_format": {"type": "text"}, "tools": [], "tool_choice": "auto", "audio": None, "modalities": ["text"],
        "prediction": None, "use_beam_search": False, "prompt_logprobs": None, "echo": False, "logprobs": None,
        "top_logprobs": 0, "seed": None, "n": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0,
        "repetition_penalty": 1.0, "stop": [], "user": "u", "store": True, "metadata": {"a": "b"},
        "parallel_tool_calls": True, "service_tier": "auto", "logit_bias": {}, "stream": False, "stream_options": None,
        "max_tokens": 5.0, "length_penalty": 1.0, "temperature": None, "best_of": None, "bad_words": [],
    }  # fmt: skip
    response = await api.post(CHAT, json={"model": MODEL, "messages": MESSAGES, **neutral})
    assert response.status_code == 200, response.text


async def test_an_unknown_field_is_let_through_and_named_once_in_the_log(
    api: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING, "splitserve.router"):
        for _ in range(3):
            assert (await api.post(CHAT, json={"messages": MESSAGES, "future_field": 1})).status_code == 200
    assert [getattr(record, "field", None) for record in caplog.records] == ["future_field"]


async def test_strict_fields_refuses_an_unknown_one():
    async with in_process(ScriptedGenerator(says("ok")), http=HttpSettings(strict_fields=True)) as api:
        error = refused(await api.post(CHAT, json={"messages": MESSAGES, "future_field": 1}))
        assert error["param"] == "future_field"
        assert (await api.post(CHAT, json={"messages": MESSAGES, "user": "u", "store": False})).status_code == 200
        options = {"include_usage": True, "future_option": 1}
        error = refused(await api.post(CHAT, json={"messages": MESSAGES, "stream": True, "stream_options": options}))
        assert error["param"] == "stream_options.future_option"


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b"", None),
        (b"\xff\xfe", None),
        (b"[]", None),
        (b"null", None),
        (b'{"messages": [}', "messages"),
        (b'{"model": "x", "temperature": NaN}', "temperature"),
        (b'{"top_p": -Infinity}', "top_p"),
        (b'{"a": {"b": [1, 2]}, "temperature": 1e999}', "temperature"),
        (b'{"user": "\xc3\x28"}', "user"),
        (b'{"user": "ok", "messages": [{"role": "user", "content": "\xed\xa0\x80"}]}', "messages"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages"),
        (b'{"messages": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "messages"),
        (b'{"n": 1' + b"0" * 400 + b"}", "n"),
        (b'{"messages": "' + b"a" * 10, "messages"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_bytes_that_are_no_json_are_refused_by_the_field_that_holds_them(
    api: httpx.AsyncClient, path: str, raw: bytes, param: str | None
):
    error = refused(await api.post(path, content=raw))
    if param != "n" or error["param"] is not None:  # a number over all limits may be read, then be out of range
        assert error["param"] in (param, f"{param}.0", "prompt")


@pytest.mark.parametrize("place", [b'"content": %b', b'"content": "x", "more": %b'])
async def test_nesting_below_the_parsers_limit_is_no_fault_of_ours_either(place: bytes):
    template = "{{ messages | tojson }}"
    deep = place % (b"[" * 1000 + b"]" * 1000)
    async with in_process(ScriptedGenerator(says("ok")), facts=facts(chat_templates={"default": template})) as api:
        refused(await api.post(CHAT, content=b'{"messages": [{"role": "user", %b}]}' % deep))


@pytest.mark.parametrize(
    "field",
    [
        "max_tokens",
        "tool_choice",
        "stop",
        "logit_bias",
        "user",
        "tools",
        "documents",
        "chat_template_kwargs",
        "messages",
    ],
)
@pytest.mark.parametrize("levels", [100, 128, 1020])
async def test_whatever_nests_deep_is_refused_by_its_fields_name(api: httpx.AsyncClient, field: str, levels: int):
    other = b"" if field == "messages" else b'"messages": [{"role": "user", "content": "x"}], '
    deep = b"[" * levels + b"]" * levels
    answer = await api.post(CHAT, content=b'{%b"%b": %b}' % (other, field.encode(), deep))
    if field != "user" or levels > 100:
        error = refused(answer)
        assert (error["param"] or "").startswith(field)
        assert ("nests deeper than 128 levels" in error["message"]) == (levels >= 128)


async def test_a_prompt_that_nests_deep_is_refused(api: httpx.AsyncClient):
    deep = b"[" * 1020 + b"]" * 1020
    for prompt in (deep, b'["a", %b]' % deep, b"[1, %b]" % deep):
        assert refused(await api.post(COMPLETIONS, content=b'{"prompt": %b}' % prompt))["param"] == "prompt"


async def test_many_objects_side_by_side_are_no_nesting(api: httpx.AsyncClient):
    messages = [{"role": "user", "content": [{"type": "text", "text": ""}]} for _ in range(100)]
    error = refused(await api.post(CHAT, json={"messages": messages}))  # 500 ids of roles: only that is too much
    assert error["code"] == "context_length_exceeded"


async def test_more_messages_than_the_context_has_tokens_are_refused_before_they_are_looked_at(api: httpx.AsyncClient):
    error = refused(await api.post(CHAT, json={"messages": [None] * 513}))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize("tail", [b"", b"\n", b"\\"])
async def test_a_string_without_an_end_is_looked_at_once(api: httpx.AsyncClient, tail: bytes):
    """Tried from each of its quotes, 900,000 bytes took hours, and nobody else was served."""
    error = refused(await api.post(COMPLETIONS, content=b'{"model":"x","prompt":"' + b'\\"' * 450_000 + tail))
    assert error["param"] == "prompt"


def test_the_field_of_a_byte_is_the_top_level_key_before_it():
    raw = rb'{"a": {"x": [1, "{,"]}, "b\"": "te,xt", "c": [{"a": 1}, 2]}'
    assert field_at(raw, raw.index(b"[1")) == "a"
    assert field_at(raw, raw.index(b"te,xt")) == r"b\""
    assert field_at(raw, raw.index(b", 2]")) == "c"
    assert field_at(b"[1, 2]", 3) is None
    assert field_at(b'{"a"b', 4) == "a"
    assert field_at(b'{"abc', 5) is None


async def test_a_prompt_over_the_context_names_both_numbers(api: httpx.AsyncClient):
    for path, body in ((COMPLETIONS, {"prompt": "x" * 600}), (COMPLETIONS, {"prompt": [1] * 600})):
        error = refused(await api.post(path, json=body))
        assert "this model's maximum context length is 512 tokens" in error["message"]
        assert "600 tokens" in error["message"]
        assert error["code"] == "context_length_exceeded"
    error = refused(await api.post(CHAT, json={"messages": [{"role": "user", "content": "x" * 600}]}))
    assert error["param"] == "messages"


async def test_a_full_context_leaves_no_room_for_an_answer(api: httpx.AsyncClient):
    assert (await api.post(COMPLETIONS, json={"prompt": "x" * 511})).status_code == 200
    assert "leaves no room" in refused(await api.post(COMPLETIONS, json={"prompt": "x" * 512}))["message"]


async def test_prompt_and_answer_together_over_the_context_name_all_numbers(api: httpx.AsyncClient):
    error = refused(await api.post(COMPLETIONS, json={"prompt": "x" * 500, "max_tokens": 13}))
    assert "this model's maximum context length is 512 tokens" in error["message"]
    assert all(number in error["message"] for number in ("513", "500", "13", "12"))
    assert error["param"] == "max_tokens"
    error = refused(await api.post(CHAT, json={"messages": MESSAGES, "max_completion_tokens": 512}))
    assert error["param"] == "max_completion_tokens"


async def test_an_unknown_model_is_a_404_and_an_alias_is_echoed_as_the_first_name(api: httpx.AsyncClient):
    error = refused(await api.post(CHAT, json={"model": "gpt-4", "messages": MESSAGES}), 404)
    assert error["code"] == "model_not_found"
    assert MODEL in error["message"]
    assert (await api.post(CHAT, json={"model": "alias", "messages": MESSAGES})).json()["model"] == MODEL
    assert (await api.post(CHAT, json={"messages": MESSAGES})).json()["model"] == MODEL


async def test_routes_and_methods_that_do_not_exist_are_answered_in_the_same_format(api: httpx.AsyncClient):
    assert refused(await api.get("/nowhere"), 404)["code"] == "not_found"
    assert refused(await api.get("/v1/"), 404)["code"] == "not_found"
    response = await api.get(CHAT)
    assert refused(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
    assert "embeddings" in refused(await api.post("/v1/embeddings", json={"input": "x"}), 404)["message"]


async def test_a_body_over_the_limit_is_a_413_whether_its_length_is_announced_or_not():
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(8):
            yield b" " * 512

    async with in_process(ScriptedGenerator(says("ok")), http=HttpSettings(max_body_bytes=2048)) as api:
        error = refused(await api.post(CHAT, content=b" " * 2049), 413)
        assert "2049" in error["message"]
        assert "2048" in error["message"]
        refused(await api.post(CHAT, content=chunks()), 413)
        assert (await api.post(CHAT, json={"messages": MESSAGES})).status_code == 200


async def test_without_the_key_only_probes_are_answered():
    settings = HttpSettings(api_key="secret, other")
    async with in_process(ScriptedGenerator(says("ok")), http=settings) as api:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
            response = await api.post(CHAT, json={"messages": MESSAGES}, headers=headers)
            assert refused(response, 401)["code"] == "invalid_api_key"
            refused(await api.get("/v1/models", headers=headers), 401)
            refused(await api.post("/tokenize", json={"prompt": "x"}, headers=headers), 401)
        for path in ("/health", "/ready", "/version"):
            assert (await api.get(path)).status_code == 200
        for key in ("secret", "other"):
            headers = {"authorization": f"Bearer {key}"}
            assert (await api.post(CHAT, json={"messages": MESSAGES}, headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [(Overloaded("full", retry_after_s=1.2), 429, "2"), (NoWorkers("no decode worker"), 503, "1")],
)
async def test_what_the_cluster_refuses_says_when_to_come_back(error: Any, status: int, retry: str):
    generator = ScriptedGenerator(says("ok"))
    generator.refuse = error
    async with in_process(generator) as api:
        for streamed in (False, True):
            response = await api.post(CHAT, json={"messages": MESSAGES, "stream": streamed})
            assert refused(response, status)["message"] == error.message
            assert response.headers["retry-after"] == retry
