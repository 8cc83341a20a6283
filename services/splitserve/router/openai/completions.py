"""`POST /v1/completions`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from splitserve.router.body import read_json
from splitserve.router.openai.api import AnswerLength, Api, api_of
from splitserve.router.openai.generate import generate
from splitserve.router.openai.respond import Job
from splitserve.router.openai.schema import known
from splitserve.router.openai.schema.fields import CompletionRequest
from splitserve.router.openai.schema.messages import prompts_of
from splitserve.router.openai.wire import CompletionWire

_DEFAULT_TOKENS = 16  # OpenAI's; an explicit null asks for the rest of the context, as in vLLM


async def completions(http: Request) -> Response:
    """Go on with one or several prompts, each a string or ids."""
    api = api_of(http)
    body = await read_json(http, api.parts.http.max_body_bytes)
    request = api.reader.read(CompletionRequest, body, known.COMPLETIONS)
    api.check_model(request.model)
    wire = CompletionWire()
    return await generate(api, http, lambda: _job(api, http, request, wire), wire, stream=bool(request.stream))


async def _job(api: Api, http: Request, request: CompletionRequest, wire: CompletionWire) -> Job:
    facts = api.parts.facts
    prompts = prompts_of(request.prompt, max_model_len=facts.max_model_len, vocab_size=facts.vocab_size)
    ids = await api.renderer.prompts(prompts, add_special_tokens=request.add_special_tokens is not False)
    default = None if "max_tokens" in request.model_fields_set else _DEFAULT_TOKENS
    return api.job(
        http,
        request,
        ids,
        id_prefix=wire.id_prefix,
        length=AnswerLength("max_tokens", request.max_tokens, default),
        logprobs=request.logprobs,
    )
