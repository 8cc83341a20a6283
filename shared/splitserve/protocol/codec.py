"""Envelope: `u32 head length | JSON head | raw tail`. No pickle; every decoded field is validated.

The head is `{"k": kind, "v": version, "t": {field: lengths}, "b": {the other fields}}`; the tail holds the fields
marked with a `columns.Tail`, in declaration order, little-endian. A field marked `trace.InHeaders` is in neither: the
bus sends it as headers (`headers_of`).
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from splitserve.errors import BadMessage, UnknownMessage
from splitserve.protocol.messages import MESSAGES, Message
from splitserve.protocol.messages.columns import Tail
from splitserve.protocol.trace import InHeaders, TraceContext, trace_of

VERSION = 1
_SWAP = sys.byteorder == "big"


@cache
def _adapter(kind: type[Message]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


@cache
def _split(kind: type[Message]) -> tuple[tuple[str, ...], tuple[tuple[str, Tail], ...]]:
    hints = get_type_hints(kind, include_extras=True)
    head: list[str] = []
    tail: list[tuple[str, Tail]] = []
    for field in fields(kind):
        marks: tuple[object, ...] = getattr(hints[field.name], "__metadata__", ())
        mark = marks[0] if marks else None
        if isinstance(mark, Tail):
            tail.append((field.name, mark))
        elif not isinstance(mark, InHeaders):
            head.append(field.name)
    return tuple(head), tuple(tail)


@cache
def _in_headers(kind: type[Message]) -> bool:
    return any(field.name == "trace" for field in fields(kind))


def _bytes_of(code: str, values: tuple[int, ...]) -> bytes:
    column = array(code, values)
    if _SWAP:
        column.byteswap()
    return column.tobytes()


def _column(code: str, raw: memoryview) -> tuple[int, ...]:
    column = array(code)
    column.frombytes(raw)
    if _SWAP:
        column.byteswap()
    return tuple(column)


def encode(message: Message) -> bytes:
    """Bytes of a message. OverflowError of a value outside its column's range becomes BadMessage."""
    kind = type(message)
    head_fields, tail_fields = _split(kind)
    tail: list[bytes] = []
    lengths: dict[str, int | list[int]] = {}
    name = ""
    try:
        for name, mark in tail_fields:
            value = getattr(message, name)
            lengths[name] = [len(row) for row in value] if mark.nested else len(value)
            tail.extend(_bytes_of(mark.code, row) for row in (value if mark.nested else (value,)))
    except (OverflowError, TypeError) as error:
        raise BadMessage(f"{kind.__name__}.{name}: {error}") from error
    body = {name: getattr(message, name) for name in head_fields}
    head = to_json({"k": kind.__name__, "v": VERSION, "t": lengths, "b": body}, inf_nan_mode="constants")
    return b"".join((len(head).to_bytes(4, "little"), head, *tail))


def headers_of(message: Message) -> dict[str, str] | None:
    """What of a message travels as headers; None for nothing."""
    trace = getattr(message, "trace", None)
    return (trace.headers() or None) if isinstance(trace, TraceContext) else None


def decode(data: bytes, headers: Mapping[str, str] | None = None) -> Message:
    """The message in `data`, with what `headers` hold of it; headers that cannot be read are ignored.

    Raises BadMessage (bytes that are no envelope, fields that do not validate, a tail of the wrong size) or
    UnknownMessage (another version, a kind this build does not know).
    """
    view = memoryview(data)
    if len(view) < 4:
        raise BadMessage(f"an envelope has at least 4 bytes, got {len(view)}")
    end = 4 + int.from_bytes(view[:4], "little")
    if end > len(view):
        raise BadMessage(f"the head ends at byte {end}, the message at {len(view)}")
    try:
        head = from_json(bytes(view[4:end]))
        name, version, lengths, body = head["k"], head["v"], head["t"], head["b"]
    except (ValueError, TypeError, KeyError) as error:
        raise BadMessage(f"the head is not readable: {error}") from error
    kind = MESSAGES.get(name) if isinstance(name, str) else None
    if kind is None or version != VERSION:
        raise UnknownMessage(f"kind {name!r} version {version!r}; this build knows version {VERSION}")
    try:
        body.update(_tail_of(kind, lengths, view[end:]))
        if _in_headers(kind):
            body["trace"] = trace_of(headers)
        return _adapter(kind).validate_python(body)
    except (ValidationError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadMessage(f"{name}: {error}") from error


def _tail_of(kind: type[Message], lengths: dict[str, Any], raw: memoryview) -> dict[str, Any]:
    found: dict[str, Any] = {}
    at = 0
    for name, mark in _split(kind)[1]:
        size = array(mark.code).itemsize
        rows: list[tuple[int, ...]] = []
        for count in lengths[name] if mark.nested else (lengths[name],):
            stop = at + count * size
            if count < 0 or stop > len(raw):
                raise BadMessage(f"{kind.__name__}.{name}: the column ends at byte {stop}, the tail at {len(raw)}")
            rows.append(_column(mark.code, raw[at:stop]))
            at = stop
        found[name] = tuple(rows) if mark.nested else rows[0]
    if at != len(raw):
        raise BadMessage(f"{kind.__name__}: {len(raw) - at} bytes are left behind the tail")
    return found
