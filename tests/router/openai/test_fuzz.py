"""Whatever a client sends, the answer is a 200 or a 4xx in OpenAI's format: never a 422, never a 5xx."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitserve.router.openai.schema import known
from splitserve.router.openai.schema.fields import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from support.generation import ScriptedGenerator, in_process, says

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
LEAVES = (
    st.none() | st.booleans() | TEXT | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([0, 1, -1, 0.0, 1.0, 2, "", "none", "auto", "text", "user", "tool"])
)  # fmt: skip
KEYS = st.sampled_from(["role", "content", "type", "text", "tool_calls", "function", "arguments", "name", "5"]) | TEXT
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
ROUTES = {
    "/v1/chat/completions": (ChatRequest, known.CHAT, {"messages": [{"role": "user", "content": "Hi"}]}),
    "/v1/completions": (CompletionRequest, known.COMPLETIONS, {"prompt": "Hi"}),
    "/tokenize": (TokenizeRequest, known.TOKENIZE, {"prompt": "Hi"}),
    "/detokenize": (DetokenizeRequest, known.TOKENIZE, {"tokens": [1]}),
}


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    path = draw(st.sampled_from(sorted(ROUTES)))
    model, accepted, base = ROUTES[path]
    names = sorted({*model.model_fields, *accepted, *known.IGNORED} - {"stream"})
    return path, {**base, **draw(st.dictionaries(st.sampled_from(names) | TEXT, VALUES, max_size=3))}


def checked(status: int, text: str) -> None:
    assert status == 200 or (400 <= status < 500 and status != 422), text
    if status != 200:
        assert set(orjson.loads(text)["error"]) == {"message", "type", "param", "code"}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(request=bodies())
async def test_any_value_in_any_field_is_answered_or_refused(request: tuple[str, dict[str, Any]]):
    path, body = request
    async with in_process(ScriptedGenerator(says("ok"))) as api:
        answer = await api.post(path, content=orjson.dumps(body))
    checked(answer.status_code, answer.text)


@pytest.mark.parametrize("path", sorted(ROUTES))
@settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=40), cut=st.integers(0, 60))
async def test_any_bytes_are_answered_or_refused(path: str, raw: bytes, cut: int):
    whole = orjson.dumps({**ROUTES[path][2], "user": "ü"})
    async with in_process(ScriptedGenerator(says("ok"))) as api:
        for body in (raw, whole[:cut] + raw + whole[cut:]):
            answer = await api.post(path, content=body)
            checked(answer.status_code, answer.text)
