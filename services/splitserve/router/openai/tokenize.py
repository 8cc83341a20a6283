"""`POST /tokenize` and `/detokenize`, as vLLM has them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from splitserve.errors import InvalidRequest
from splitserve.router.body import read_json
from splitserve.router.openai.api import Api, api_of
from splitserve.router.openai.chat import chat_prompt
from splitserve.router.openai.schema import known
from splitserve.router.openai.schema.fields import DetokenizeRequest, TokenizeRequest
from splitserve.router.openai.wire import dumps
from splitserve.router.text import Detokenizer

_PART = 4096  # ids that become text at a time


async def tokenize(http: Request) -> Response:
    """Ids of a prompt, or of messages as the chat template renders them."""
    api = api_of(http)
    request = api.reader.read(TokenizeRequest, await read_json(http, api.parts.http.max_body_bytes), known.TOKENIZE)
    api.check_model(request.model)
    if request.messages is not None:
        ids = await api.renderer.chat(chat_prompt(request), limit=False)
    elif request.prompt is not None:
        special = request.add_special_tokens is not False
        (ids,) = await api.renderer.prompts([request.prompt], add_special_tokens=special, limit=False)
    else:
        raise InvalidRequest("prompt is missing; messages would do too", param="prompt")
    texts = await asyncio.to_thread(_texts, api, ids) if request.return_token_strs else None
    return _json(
        {"count": len(ids), "max_model_len": api.parts.facts.max_model_len, "tokens": ids, "token_strs": texts}
    )


async def detokenize(http: Request) -> Response:
    """The text of ids, special tokens included."""
    api = api_of(http)
    request = api.reader.read(DetokenizeRequest, await read_json(http, api.parts.http.max_body_bytes), known.TOKENIZE)
    api.check_model(request.model)
    last = api.parts.facts.vocab_size - 1
    if max(request.tokens, default=0) > last:
        bad = next(at for at, id in enumerate(request.tokens) if id > last)
        raise InvalidRequest(f"tokens.{bad} is {request.tokens[bad]}, ids end at {last}", param=f"tokens.{bad}")
    return _json({"prompt": await asyncio.to_thread(_text, api, request.tokens)})


def _texts(api: Api, ids: Sequence[int]) -> list[str]:
    return [api.parts.tokenizer.token_text(id) for id in ids]


def _text(api: Api, ids: Sequence[int]) -> str:
    """In parts: the tokenizer's library lets nothing else run while it makes a text."""
    tokenizer = api.parts.tokenizer
    if len(ids) <= _PART:
        return tokenizer.decode(ids, False)
    text = Detokenizer(partial(tokenizer.decode, skip_special_tokens=False), concatenates=tokenizer.concatenates)
    parts = [text.push(ids[at : at + _PART]) for at in range(0, len(ids), _PART)]
    return "".join(parts) + text.flush()


def _json(value: object) -> Response:
    return Response(dumps(value), media_type="application/json")
