"""Request bodies: read under a limit, parsed to JSON, each fault a 4xx that says where it lies."""

from __future__ import annotations

import asyncio
import re
from typing import cast

import orjson
from starlette.requests import Request

from splitserve.errors import BodyTooLarge, InvalidRequest
from splitserve.router.http_errors import ClientGone

Body = dict[str, object]

_PAUSE_S = 60.0  # longest wait for the next part of a body
_LARGE = 1 << 18  # bytes from which a body is parsed in a thread
_NAMED = 1 << 20  # bytes up to which the field of a fault is looked for
_DEEPEST = 128  # levels: what is read here is shown, compared and rendered by code that recurses
# a string without its end is one token too, to the last byte: else each quote in it would be tried as a beginning
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+("?)|[{}\[\],]', re.DOTALL)


async def read_json(request: Request, limit: int) -> Body:
    """The body's JSON object.

    Raises BodyTooLarge over `limit` bytes (at once when Content-Length says so), InvalidRequest for what is no JSON
    object, ClientGone when the client left.
    """
    raw = await _read(request, limit)
    data = await asyncio.to_thread(parse, raw) if len(raw) > _LARGE else parse(raw)
    if not isinstance(data, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {type(data).__name__}")
    return cast(Body, data)


async def _read(request: Request, limit: int) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise _too_large(int(announced[:20]), limit)
    parts: list[bytes] = []
    size = 0
    while True:
        try:
            async with asyncio.timeout(_PAUSE_S):
                message = await request.receive()
        except TimeoutError:
            raise InvalidRequest(f"the body stopped after {size} bytes and {_PAUSE_S:g} s of silence") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large(size, limit)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(size: int, limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has at least {size} bytes, the limit is {limit}; see --max-body-bytes")


def parse(raw: bytes) -> object:
    """JSON as RFC 8259 has it: UTF-8, no NaN or infinity, no lone surrogates, at most 128 levels.

    Raises InvalidRequest whose `param` is the top-level field at fault, when there is one.
    """
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        at, problem = error.pos, error.msg
    else:
        if raw.count(b"[") + raw.count(b"{") > _DEEPEST:
            _check_depth(data)
        return data
    try:
        text = raw.decode()
    except UnicodeDecodeError as bad:
        at, problem = bad.start, f"byte 0x{raw[bad.start]:02x} is no UTF-8"
    else:
        at = len(text[:at].encode())
    field = field_at(raw, at) if at < _NAMED else None
    where = f"in {field!r}, " if field else ""
    raise InvalidRequest(f"the body is no JSON: {where}at byte {at}: {problem}", param=field)


def _check_depth(data: object) -> None:
    fields = cast(Body, data).items() if isinstance(data, dict) else [(None, data)]
    for field, value in fields:
        if _deeper(value, _DEEPEST - 1):
            raise InvalidRequest(f"{field or 'the body'} nests deeper than {_DEEPEST} levels: flatten it", param=field)


def _deeper(value: object, levels: int) -> bool:
    """Whether `value` has lists and objects in more levels than so many."""
    level = [value]
    for _ in range(levels):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (cast(Body, outer).values() if isinstance(outer, dict) else cast(list[object], outer))
        ]
        if not level:
            return False
    return any(isinstance(outer, dict | list) for outer in level)


def field_at(raw: bytes, at: int) -> str | None:
    """The top-level key whose value holds byte `at`."""
    depth = 0
    is_key, field = True, None
    for match in _TOKEN.finditer(raw, 0, at):
        token = match[0]
        if token in b"{[":
            depth += 1
        elif token in b"}]":
            depth -= 1
        elif token == b",":
            is_key = is_key or depth == 1
        elif is_key and depth == 1 and match[1]:
            field, is_key = token[1:-1].decode(errors="replace"), False
    return field
