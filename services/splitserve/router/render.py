"""From a request's words to ids: template, tokenizer, limits. What takes long runs in a thread.

Too long a prompt is refused by its bytes, or by the ids of its beginning, before all of it is tokenised.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from splitserve.errors import InvalidRequest, ModelUnavailable
from splitserve.model.facts import ModelFacts
from splitserve.model.template import ChatTemplate, mentions
from splitserve.model.tokenizer import Tokenizer
from splitserve.router.openai.schema.messages import Message, Prompt, template_messages, too_long

_INLINE_CHARS = 8192  # texts up to this are tokenised at once: a few milliseconds
_MESSAGE_CHARS = 64  # what a message costs a template beside its text
_PROBE_CHARS = 8  # per token of the context: a text of which this is not enough is looked at in parts
_SLACK = 64  # tokens by which cutting a text may change the count of its beginning

_PLAIN = frozenset({"role", "content", "name"})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """What of a request the template sees."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[object] | None = None
    documents: Sequence[object] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None
    variables: Mapping[str, object] | None = None


class Renderer:
    """One model's template and tokenizer."""

    def __init__(self, tokenizer: Tokenizer, facts: ModelFacts, *, trust_request_template: bool = False) -> None:
        self._tokenizer = tokenizer
        self._facts = facts
        self._foreign = tokenizer.vocab_size > facts.vocab_size  # the tokenizer may give ids that the model lacks
        self._trust = trust_request_template
        self._max_bytes = facts.max_model_len * tokenizer.longest_token_bytes
        self._templates = {
            name: ChatTemplate(source, tokenizer.named_tokens) for name, source in facts.chat_templates.items()
        }

    async def chat(self, chat: ChatPrompt, *, limit: bool = True) -> list[int]:
        """Ids of a conversation. Raises InvalidRequest, ContextTooLong."""
        template = self._template(chat)
        messages = template_messages(chat.messages, keep_developer=mentions(template.source, "developer"))
        _check_continuation(chat)
        work = partial(self._chat, chat, template, messages, limit)
        if chat.tools or chat.documents or chat.variables or any(message.keys() - _PLAIN for message in messages):
            return await asyncio.to_thread(work)  # of any size
        return await _run(sum(_MESSAGE_CHARS + len(str(message["content"])) for message in messages), work)

    async def prompts(
        self, prompts: Sequence[Prompt], *, add_special_tokens: bool, limit: bool = True
    ) -> list[list[int]]:
        """Ids of each prompt. Raises InvalidRequest for an empty one, ContextTooLong."""
        size = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))

        def encode_all() -> list[list[int]]:
            return [
                self._encode(prompt, add_special_tokens, limit) if isinstance(prompt, str) else prompt
                for prompt in prompts
            ]

        return await _run(size, encode_all)

    def _template(self, chat: ChatPrompt) -> ChatTemplate:
        if chat.chat_template is not None:
            return self._requested_template(chat.chat_template)
        name = "tool_use" if chat.tools and "tool_use" in self._templates else "default"
        template = self._templates.get(name)
        if template is None:
            raise InvalidRequest(
                "this model has no chat template, so it takes no messages: use /v1/completions, "
                "or start the server with --chat-template FILE",
                param="messages",
            )
        return template

    def _requested_template(self, source: str) -> ChatTemplate:
        if not self._trust:
            raise InvalidRequest(
                "this server takes no chat_template from requests (--trust-request-chat-template)",
                param="chat_template",
            )
        try:
            return ChatTemplate(source, self._tokenizer.named_tokens)
        except ModelUnavailable as error:  # not the server's model is at fault, but the request
            raise InvalidRequest(error.message, param="chat_template") from error

    def _chat(self, chat: ChatPrompt, template: ChatTemplate, messages: Sequence[Message], limit: bool) -> list[int]:
        text = template.render(
            messages,
            tools=chat.tools or None,
            documents=chat.documents,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
            variables=chat.variables,
        )
        return self._encode(text, chat.add_special_tokens, limit, "messages")

    def _encode(self, text: str, add_special_tokens: bool, limit: bool, param: str = "prompt") -> list[int]:
        if limit:
            self._check_size(text, param)
        ids = self._tokenizer.encode(text, add_special_tokens)
        if limit:
            self._check_ids(ids, param)
        return ids

    def _check_ids(self, ids: list[int], param: str) -> None:
        if not ids:
            raise InvalidRequest(f"{param} has no tokens: it is empty", param=param)
        if len(ids) >= self._facts.max_model_len:
            raise too_long(len(ids), self._facts.max_model_len, param=param)
        if self._foreign and max(ids) >= self._facts.vocab_size:  # Gemma 3's <image_soft_token>, in a text-only model
            token = self._tokenizer.token_text(max(ids))
            raise InvalidRequest(f"{param} holds the token {token!r}, for which this model has no row", param=param)

    def _check_size(self, text: str, param: str) -> None:
        longest = self._facts.max_model_len
        size = len(text.encode())
        if size > self._max_bytes:
            raise too_long(-(-size // self._tokenizer.longest_token_bytes), longest, at_least=True, param=param)
        part = _PROBE_CHARS * longest
        while part < len(text):
            tokens = len(self._tokenizer.encode(text[:part], False))
            if tokens > longest + _SLACK:
                raise too_long(tokens, longest, at_least=True, param=param)
            part *= 2


def _check_continuation(chat: ChatPrompt) -> None:
    if chat.continue_final_message and chat.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message needs add_generation_prompt: false", param="continue_final_message"
        )


async def _run(size: int, work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work) if size > _INLINE_CHARS else work()
