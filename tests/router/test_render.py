"""From words to ids under limits, with real tokenizers."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from splitserve.config import ModelSettings
from splitserve.errors import ContextTooLong, InvalidRequest, ModelUnavailable
from splitserve.model.facts import ModelFacts
from splitserve.model.tokenizer import Tokenizer
from splitserve.router.render import ChatPrompt, Renderer
from support.generation import byte_tokenizer, facts

HELLO = [{"role": "user", "content": "Hello"}]


def renderer(folder: Path, trust: bool = False) -> Renderer:
    tokenizer = Tokenizer.load(folder)
    return Renderer(tokenizer, ModelFacts.load(folder, tokenizer, ModelSettings()), trust_request_template=trust)


@pytest.mark.model
@pytest.mark.parametrize("text", ["a" * 1_000_000, "word " * 200_000, "\n" * 1_000_000, "日本" * 500_000])
async def test_a_million_characters_are_refused_in_milliseconds_and_the_loop_goes_on(smollm2_folder: Path, text: str):
    render = renderer(smollm2_folder)
    longest = 0.0

    async def beat() -> None:
        nonlocal longest
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - began)

    beating = asyncio.create_task(beat())
    began = time.monotonic()
    with pytest.raises(ContextTooLong, match=r"this model's maximum context length is 8192 tokens.*at least \d+"):
        await render.prompts([text], add_special_tokens=True)
    took = time.monotonic() - began
    beating.cancel()
    assert took < 1
    assert longest < 0.2


@pytest.mark.model
@pytest.mark.slow
async def test_a_base_model_takes_no_messages(gemma3_folder: Path):
    render = renderer(gemma3_folder)
    with pytest.raises(InvalidRequest, match="no chat template") as caught:
        await render.chat(ChatPrompt(HELLO))
    assert caught.value.param == "messages"
    (ids,) = await render.prompts(["Hello"], add_special_tokens=True)
    assert ids[0] == 2  # <bos>


@pytest.mark.model
async def test_a_chat_of_smollm2_gives_the_ids_of_transformers(smollm2_folder: Path):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(smollm2_folder), local_files_only=True)
    ids = await renderer(smollm2_folder).chat(ChatPrompt(HELLO))
    assert ids == theirs.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)


async def test_a_text_that_just_fits_is_not_refused_by_its_size():
    render = Renderer(byte_tokenizer(), facts(max_model_len=20_000))
    (ids,) = await render.prompts(["x" * 19_999], add_special_tokens=False)
    assert len(ids) == 19_999
    with pytest.raises(ContextTooLong, match="20000 tokens"):
        await render.prompts(["x" * 20_000], add_special_tokens=False)


async def test_a_request_brings_its_own_template_only_where_that_is_allowed():
    chat = ChatPrompt(HELLO, chat_template="own: {{ messages[0].content }}")
    with pytest.raises(InvalidRequest, match="--trust-request-chat-template"):
        await Renderer(byte_tokenizer(), facts()).chat(chat)
    render = Renderer(byte_tokenizer(), facts(), trust_request_template=True)
    assert bytes(await render.chat(chat)) == b"own: Hello"
    with pytest.raises(InvalidRequest, match="malformed"):
        await render.chat(ChatPrompt(HELLO, chat_template="{% for %}"))


async def test_a_token_that_the_model_has_no_row_for_is_refused():
    render = Renderer(byte_tokenizer(), facts(vocab_size=257))
    assert await render.prompts(["a</s>"], add_special_tokens=False) == [[97, 256]]
    with pytest.raises(InvalidRequest, match="'<s>', for which this model has no row"):
        await render.prompts(["a<s>"], add_special_tokens=False)


async def test_tools_choose_the_template_that_is_made_for_them():
    both = facts(chat_templates={"default": "plain", "tool_use": "with tools"})
    render = Renderer(byte_tokenizer(), both)
    assert bytes(await render.chat(ChatPrompt(HELLO))) == b"plain"
    assert bytes(await render.chat(ChatPrompt(HELLO, tools=[{"type": "function"}]))) == b"with tools"


def test_a_model_with_a_malformed_template_does_not_start():
    with pytest.raises(ModelUnavailable, match="malformed"):
        Renderer(byte_tokenizer(), facts(chat_templates={"default": "{{"}))
