"""Chat messages and prompts, from the shapes that clients send to the one that a template or tokenizer takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import orjson

from splitserve.errors import ContextTooLong, InvalidRequest, UnsupportedField

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}

Message = dict[str, object]
Prompt = str | list[int]

MAX_PROMPTS = 1024


def template_messages(messages: Sequence[dict[str, Any]], *, keep_developer: bool) -> list[Message]:
    """Messages as a template expects them, as vLLM gives them.

    Content is a string: text parts are joined by line breaks, null becomes "". Arguments of tool calls are objects, not
    their JSON. Role `developer` becomes `system` unless the template knows it. Raises InvalidRequest naming the place.
    """
    return [_message(message, f"messages.{at}", keep_developer) for at, message in enumerate(messages)]


def _message(message: dict[str, Any], where: str, keep_developer: bool) -> Message:
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{where}.role is missing or no string", param=f"{where}.role")
    if role == "developer" and not keep_developer:
        role = "system"
    plain: Message = {**message, "role": role, "content": _content(message.get("content"), f"{where}.content")}
    if message.get("tool_calls") is not None:
        plain["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}.tool_calls")
    return plain


def _content(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} is a string, a list of parts or null", param=where)
    return "\n".join(_part(part, f"{where}.{at}") for at, part in enumerate(cast(list[object], content)))


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise InvalidRequest(f"{where} is no content part", param=where)
    fields = cast(dict[str, object], part)
    kind = fields.get("type", "text")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise UnsupportedField(f"{where}: parts of type {str(kind)[:40]!r} are not supported, only text", param=where)
    text = fields.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        where = f"{where}.{_TEXT_PARTS[kind]}"
        raise InvalidRequest(f"{where} is missing or no string", param=where)
    return text


def _tool_calls(calls: object, where: str) -> list[object]:
    if not isinstance(calls, list):
        raise InvalidRequest(f"{where} is no list", param=where)
    return [_tool_call(call, f"{where}.{at}") for at, call in enumerate(cast(list[object], calls))]


def _tool_call(call: object, where: str) -> object:
    function = cast(dict[str, object], call).get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise InvalidRequest(f"{where}.function is missing or no object", param=where)
    function = cast(dict[str, object], function)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments) if arguments.strip() else {}
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(f"{where}.function.arguments is no JSON: {error}", param=where) from None
    return {**cast(dict[str, object], call), "function": {**function, "arguments": arguments}}


def prompts_of(prompt: object, *, max_model_len: int, vocab_size: int) -> list[Prompt]:
    """The prompts of a completion request: a string, ids, or a list of either. Raises InvalidRequest, ContextTooLong."""
    items = cast(list[object], prompt) if isinstance(prompt, list) else [prompt]
    if not items:
        raise InvalidRequest("prompt is an empty list", param="prompt")
    if isinstance(prompt, list) and isinstance(items[0], int):
        return [_ids(items, "prompt", max_model_len, vocab_size)]
    if len(items) > MAX_PROMPTS:
        raise InvalidRequest(f"{len(items)} prompts in one request, the limit is {MAX_PROMPTS}", param="prompt")
    return [
        _prompt(item, f"prompt.{at}" if isinstance(prompt, list) else "prompt", max_model_len, vocab_size)
        for at, item in enumerate(items)
    ]


def _prompt(item: object, where: str, max_model_len: int, vocab_size: int) -> Prompt:
    if isinstance(item, str):
        return item
    if isinstance(item, list):
        return _ids(cast(list[object], item), where, max_model_len, vocab_size)
    raise InvalidRequest("prompt is a string, a list of strings, a list of ids or a list of lists of ids", param=where)


def _ids(ids: list[object], where: str, max_model_len: int, vocab_size: int) -> list[int]:
    if not ids:
        raise InvalidRequest(f"{where} is an empty list", param=where)
    if len(ids) > max_model_len:
        raise too_long(len(ids), max_model_len)
    if {type(id) for id in ids} == {int} and 0 <= min(cast(list[int], ids)) <= max(cast(list[int], ids)) < vocab_size:
        return cast(list[int], ids)
    for at, id in enumerate(ids):
        if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < vocab_size:
            raise InvalidRequest(
                f"{where}.{at} is {str(id)[:40]}: ids are integers from 0 to {vocab_size - 1}", param=f"{where}.{at}"
            )
    return cast(list[int], ids)


def too_long(tokens: int, max_model_len: int, *, at_least: bool = False, param: str = "prompt") -> ContextTooLong:
    """litellm and others know the error by "this model's maximum context length is"."""
    return ContextTooLong(
        f"The prompt is too long: this model's maximum context length is {max_model_len} tokens, and the prompt has "
        f"{'at least ' if at_least else ''}{tokens} tokens, which leaves no room for an answer. Shorten the prompt.",
        param=param,
    )
