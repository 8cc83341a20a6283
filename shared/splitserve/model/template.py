"""Chat templates, rendered as transformers renders them: the same sandbox, options, filters and globals.

Source of the environment: `transformers/utils/chat_template_utils.py` 5.24 (not imported: it drags numpy and torch in).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, cast

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from splitserve.errors import InvalidRequest, ModelUnavailable

Message = Mapping[str, object]

_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "
# what a template's own code can raise when messages do not have the shape that it expects
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class ChatTemplate:
    """One compiled template. Raises ModelUnavailable when the source is no template."""

    def __init__(self, source: str, named_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._tokens = dict(named_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ModelUnavailable(f"the chat template is malformed: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[object] | None = None,
        documents: Sequence[object] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt's text. Raises InvalidRequest when the template refuses the messages."""
        chat = [_plain(message) for message in messages]
        if continue_final_message:
            chat[-1] = {**chat[-1], "content": _final_text(chat) + _CONTINUE}
        try:
            text = self._template.render(
                messages=chat,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                **{**self._tokens, **(variables or {})},
            )
        except _TEMPLATE_FAULTS as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {str(error) or type(error).__name__}",
                param="messages",
            ) from error
        return _cut(text) if continue_final_message else text


def _plain(message: Message) -> dict[str, object]:
    """Without keys that are None, reasoning under each of its names: what transformers gives to a template."""
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = plain.get("reasoning_content", plain.get("thinking", plain.get("reasoning")))
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _final_text(chat: Sequence[Message]) -> str:
    content = chat[-1].get("content")
    if not isinstance(content, str):
        raise InvalidRequest(
            "continue_final_message needs a last message with text to continue", param="continue_final_message"
        )
    return content


def _cut(text: str) -> str:
    """Drop the mark and all that the template wrote after it; trailing space that the template trimmed stays away."""
    at = text.rfind(_CONTINUE.strip())
    if at < 0:
        raise InvalidRequest(
            "the chat template does not keep the last message's text, so it cannot be continued",
            param="continue_final_message",
        )
    kept = text[:at]
    return kept if text.startswith(_CONTINUE, at) else kept.rstrip()


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote; for a prompt its body is just text."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return str(caller())


class _Dict:
    """`dict` without the attributes by which a template could leave the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` that stores no underscore names."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template may not store {name!r} on a namespace")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    names: dict[str, Callable[..., object]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    environment.globals.update(cast(dict[str, Any], names))
    return environment


def mentions(source: str, word: str) -> bool:
    """Whether a template knows of `word`, such as a role."""
    return re.search(rf"\b{re.escape(word)}\b", source) is not None
