"""`/v1/chat/completions` as the official client sees it, over a real server."""

from __future__ import annotations

import openai
import pytest
from support.generation import MODEL, ScriptedGenerator, prompt_text, says, served

from splitserve.errors import Overloaded, RequestFailed
from splitserve.protocol.states import FinishReason
from splitserve.router.generation import Done, Tokens

HELLO = [{"role": "user", "content": "Hello"}]


def client(port: int) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k", max_retries=0)


async def test_a_whole_answer_has_text_reason_and_usage():
    generator = ScriptedGenerator(says("Hi there, Köln 👋"))
    async with served(generator) as port, client(port) as api:
        answer = await api.chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.choices[0].message.content == "Hi there, Köln 👋"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == MODEL
    assert answer.id == generator.submitted[0].submission.rid
    assert answer.usage.prompt_tokens == len("<user>Hello<a>")
    assert answer.usage.completion_tokens == len("Hi there, Köln 👋".encode()) + 1
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    assert prompt_text(generator.submitted[0].submission.ids) == "<user>Hello<a>"
