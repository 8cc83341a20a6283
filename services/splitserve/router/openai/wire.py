"""Answers as bytes: JSON bodies and server-sent events. Pure; chunks are joined from parts that are made once a request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import orjson

from splitserve.router.openai.answers import Delta, TokenRecord, Usage

Json = dict[str, object]

DONE = b"data: [DONE]\n\n"
_LEAST_LOGPROB = -9999.0  # JSON has no infinity; vLLM writes this too
# line ends to some clients (Java's, Python's str.splitlines), though not to the SSE standard
_LINE_ENDS = (("\u2028".encode(), b"\\u2028"), ("\u2029".encode(), b"\\u2029"), ("\u0085".encode(), b"\\u0085"))


class Spelling(Protocol):
    """What this module needs of a tokenizer."""

    def token_bytes(self, id: int) -> bytes: ...

    def token_text(self, id: int) -> str: ...


def dumps(value: object) -> bytes:
    """JSON without characters that a client may take for the end of a line."""
    raw = orjson.dumps(value)
    if not raw.isascii():
        for char, escape in _LINE_ENDS:
            raw = raw.replace(char, escape)
    return raw


def usage_object(usage: Usage) -> Json:
    shown: Json = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    if usage.stages:
        shown["stage_seconds"] = {stage: round(seconds, 6) for stage, seconds in usage.stages.items()}
    return shown


class Wire(Protocol):
    """One endpoint's way to write answers."""

    object: str
    chunk_object: str
    id_prefix: str

    def opening(self, index: int) -> bytes:
        """A choice's first chunk, b"" when it has none of its own."""
        ...

    def chunk(self, delta: Delta, spelling: Spelling, *, logprobs: bool) -> bytes:
        """One entry of `choices`."""
        ...

    def around(self, index: int) -> tuple[bytes, bytes]:
        """What `chunk` writes before and behind a text that comes without log-probabilities and ends nothing."""
        ...

    def choice(self, delta: Delta, spelling: Spelling, *, logprobs: bool) -> Json:
        """One entry of `choices` in a whole answer."""
        ...


def _ending(delta: Delta) -> bytes:
    if delta.finish_reason is None:
        return b'"finish_reason":null}'
    return b'"finish_reason":"%b","stop_reason":%b}' % (delta.finish_reason.encode(), dumps(delta.stop_reason))


class ChatWire:
    """`chat.completion`."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def opening(self, index: int) -> bytes:
        return b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}' % index

    def chunk(self, delta: Delta, spelling: Spelling, *, logprobs: bool) -> bytes:
        probs = dumps(self._logprobs(delta.records, spelling)) if logprobs else b"null"
        return b'{"index":%d,"delta":{"content":%b},"logprobs":%b,%b' % (
            delta.index,
            dumps(delta.text),
            probs,
            _ending(delta),
        )

    def around(self, index: int) -> tuple[bytes, bytes]:
        return b'{"index":%d,"delta":{"content":' % index, b'},"logprobs":null,"finish_reason":null}'

    def choice(self, delta: Delta, spelling: Spelling, *, logprobs: bool) -> Json:
        return {
            "index": delta.index,
            "message": {"role": "assistant", "content": delta.text, "refusal": None},
            "logprobs": self._logprobs(delta.records, spelling) if logprobs else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }

    def _logprobs(self, records: Sequence[TokenRecord], spelling: Spelling) -> Json:
        return {
            "content": [
                {
                    **_chat_token(record.id, record.logprob.logprob, spelling),
                    "top_logprobs": [_chat_token(id, value, spelling) for id, value in record.logprob.top],
                }
                for record in records
            ]
        }


def _chat_token(id: int, logprob: float, spelling: Spelling) -> Json:
    return {
        "token": spelling.token_text(id),
        "logprob": max(logprob, _LEAST_LOGPROB),
        "bytes": list(spelling.token_bytes(id)),
    }


class CompletionWire:
    """`text_completion`."""

    object = "text_completion"
    chunk_object = "text_completion"
    id_prefix = "cmpl-"

    def opening(self, index: int) -> bytes:
        return b""

    def chunk(self, delta: Delta, spelling: Spelling, *, logprobs: bool) -> bytes:
        probs = dumps(self._logprobs(delta.records, spelling)) if logprobs else b"null"
        return b'{"index":%d,"text":%b,"logprobs":%b,%b' % (delta.index, dumps(delta.text), probs, _ending(delta))

    def around(self, index: int) -> tuple[bytes, bytes]:
        return b'{"index":%d,"text":' % index, b',"logprobs":null,"finish_reason":null}'

    def choice(self, delta: Delta, spelling: Spelling, *, logprobs: bool) -> Json:
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._logprobs(delta.records, spelling) if logprobs else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }

    def _logprobs(self, records: Sequence[TokenRecord], spelling: Spelling) -> Json:
        return {
            "text_offset": [record.offset for record in records],
            "token_logprobs": [max(record.logprob.logprob, _LEAST_LOGPROB) for record in records],
            "tokens": [spelling.token_text(record.id) for record in records],
            "top_logprobs": [_top(record, spelling) for record in records],
        }


def _top(record: TokenRecord, spelling: Spelling) -> dict[str, float]:
    """The best tokens and the chosen one; of two tokens that read alike the better one is kept."""
    found: dict[str, float] = {}
    for id, value in (*record.logprob.top, (record.id, record.logprob.logprob)):
        found.setdefault(spelling.token_text(id), max(value, _LEAST_LOGPROB))
    return found


class ChunkWriter:
    """Server-sent events of one request: same id, created and model in each."""

    def __init__(
        self, wire: Wire, spelling: Spelling, head: Json, *, logprobs: bool, include_usage: bool, continuous: bool
    ) -> None:
        self._wire = wire
        self._spelling = spelling
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._continuous = continuous
        self._head = b"data: " + dumps({**head, "object": wire.chunk_object})[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self.plain = not logprobs and not continuous  # events hold text alone, until an answer ends
        self._around: dict[int, tuple[bytes, bytes]] = {}  # by choice

    def opening(self, indices: Sequence[int], usage: Callable[[int], Usage]) -> bytes:
        """The chunks before any text: one a choice that says whose role it has."""
        chunks = ((index, self._wire.opening(index)) for index in indices)
        return b"".join(self._event(chunk, index, usage) for index, chunk in chunks if chunk)

    def deltas(self, deltas: Sequence[Delta], usage: Callable[[int], Usage]) -> bytes:
        if len(deltas) == 1:
            return self._delta(deltas[0], usage)
        return b"".join([self._delta(delta, usage) for delta in deltas])

    def around(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and behind the text in an event that holds nothing else."""
        around = self._around.get(index)
        if around is None:
            before, behind = self._wire.around(index)
            around = self._around[index] = (self._head + before, behind + self._tail)
        return around

    def closing(self, usage: Usage) -> bytes:
        """The usage chunk, if it was asked for, and the mark of the end."""
        if not self._include_usage:
            return DONE
        return self._head + b'],"usage":' + dumps(usage_object(usage)) + b"}\n\n" + DONE

    def _delta(self, delta: Delta, usage: Callable[[int], Usage]) -> bytes:
        if not self.plain or delta.finish_reason is not None:
            return self._event(self._wire.chunk(delta, self._spelling, logprobs=self._logprobs), delta.index, usage)
        before, behind = self.around(delta.index)
        return before + dumps(delta.text) + behind

    def _event(self, choice: bytes, index: int, usage: Callable[[int], Usage]) -> bytes:
        tail = b'],"usage":' + dumps(usage_object(usage(index))) + b"}\n\n" if self._continuous else self._tail
        return self._head + choice + tail


def error_events(error: Json) -> bytes:
    """An error after the first chunk: the status is spent, so it comes as an event."""
    return b"data: " + dumps(error) + b"\n\n" + DONE


def whole_answer(
    wire: Wire, spelling: Spelling, head: Json, deltas: Sequence[Delta], usage: Usage, *, logprobs: bool
) -> bytes:
    return orjson.dumps(
        {
            **head,
            "object": wire.object,
            "choices": [wire.choice(delta, spelling, logprobs=logprobs) for delta in deltas],
            "usage": usage_object(usage),
            "system_fingerprint": None,
        }
    )
