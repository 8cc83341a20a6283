"""`POST /tokenize` and `/detokenize`, as vLLM has them."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from splitserve.errors import InvalidRequest
from splitserve.router.body import read_json
from splitserve.router.openai.api import api_of
from splitserve.router.openai.chat import chat_prompt
from splitserve.router.openai.schema import known
from splitserve.router.openai.schema.fields import DetokenizeRequest, TokenizeRequest


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
    texts = [api.parts.tokenizer.token_text(id) for id in ids] if request.return_token_strs else None
    return JSONResponse(
        {"count": len(ids), "max_model_len": api.parts.facts.max_model_len, "tokens": ids, "token_strs": texts}
    )


async def detokenize(http: Request) -> Response:
    """The text of ids, special tokens included."""
    api = api_of(http)
    request = api.reader.read(DetokenizeRequest, await read_json(http, api.parts.http.max_body_bytes), known.TOKENIZE)
    api.check_model(request.model)
    last = api.parts.facts.vocab_size - 1
    bad = next((at for at, id in enumerate(request.tokens) if id > last), None)
    if bad is not None:
        raise InvalidRequest(f"tokens.{bad} is {request.tokens[bad]}, ids end at {last}", param=f"tokens.{bad}")
    text = await asyncio.to_thread(api.parts.tokenizer.decode, request.tokens, False)
    return JSONResponse({"prompt": text})
