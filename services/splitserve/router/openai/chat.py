"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import Response

from splitserve.errors import InvalidRequest, UnsupportedField
from splitserve.router.body import Body, read_json
from splitserve.router.openai.api import AnswerLength, Api, api_of
from splitserve.router.openai.generate import generate
from splitserve.router.openai.respond import Job
from splitserve.router.openai.schema import known
from splitserve.router.openai.schema.fields import ChatRequest, TokenizeRequest
from splitserve.router.openai.schema.messages import too_long
from splitserve.router.openai.wire import ChatWire
from splitserve.router.render import ChatPrompt


async def chat_completions(http: Request) -> Response:
    """Answer a conversation."""
    api = api_of(http)
    body = await read_json(http, api.parts.http.max_body_bytes)
    check_count(body, api.parts.facts.max_model_len)
    request = api.reader.read(ChatRequest, body, known.CHAT)
    api.check_model(request.model)
    check_tools(request)
    wire = ChatWire()
    return await generate(api, http, lambda: _job(api, http, request, wire), wire, stream=bool(request.stream))


async def _job(api: Api, http: Request, request: ChatRequest, wire: ChatWire) -> Job:
    ids = await api.renderer.chat(chat_prompt(request))
    field = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    wanted = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    return api.job(
        http,
        request,
        [ids],
        id_prefix=wire.id_prefix,
        length=AnswerLength(field, wanted),
        logprobs=_logprobs(request),
    )


def chat_prompt(request: ChatRequest | TokenizeRequest) -> ChatPrompt:
    """What the template sees. `reasoning_effort` reaches it as vLLM gives it, `enable_thinking` beside it."""
    variables: dict[str, Any] = {}
    if request.reasoning_effort is not None:
        variables["reasoning_effort"] = request.reasoning_effort
        variables["enable_thinking"] = request.reasoning_effort != "none"
    return ChatPrompt(
        messages=request.messages or [],
        tools=request.tools,
        documents=request.documents,
        add_generation_prompt=request.add_generation_prompt is not False,
        continue_final_message=bool(request.continue_final_message),
        add_special_tokens=bool(request.add_special_tokens),
        chat_template=request.chat_template,
        variables={**variables, **_variables(request.chat_template_kwargs)},
    )


# what `ChatTemplate.render` itself gives to a template: a request's variables may not stand in for it
_TAKEN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})


def _variables(given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    taken = next((name for name in given or {} if name in _TAKEN), None)
    if taken is not None:
        raise InvalidRequest(f"chat_template_kwargs.{taken}: send it as {taken}", param=f"chat_template_kwargs.{taken}")
    return given or {}


def _logprobs(request: ChatRequest) -> int | None:
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    return None


def check_count(body: Body, max_model_len: int) -> None:
    """A message is a token at least: far too many need not be looked at one by one. Raises ContextTooLong."""
    messages = body.get("messages")
    count = len(cast(list[object], messages)) if isinstance(messages, list) else 0
    if count > max_model_len:
        raise too_long(count, max_model_len, at_least=True, param="messages")


def check_tools(request: ChatRequest) -> None:
    """Tools are shown to the template only; calling them is not served yet, so it must be ruled out by the request."""
    choice = request.tool_choice
    if isinstance(choice, dict) or choice not in (None, "none", "auto"):
        shown = str(cast(object, choice))[:60]
        raise UnsupportedField(f"tool_choice {shown} is not supported yet, only 'none'", param="tool_choice")
    if request.tools and choice != "none":
        raise UnsupportedField("tools are not supported yet but with tool_choice: 'none'", param="tools")
