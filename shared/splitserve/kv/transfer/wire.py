"""The tcp transport's frames, and sending and receiving under a limit on silence.

request   header | JSON: handle, token, incarnation, layout, block_bytes, checksums, counts by group | blocks u32[]
answer    header | JSON: code "ok" or an error's wire code, message
          then, if "ok": the blocks' bytes in the order asked | checksums u64[] if asked for

header    magic "SSKV" | version u16 | unused u16 | body length u32 (of JSON length u32 + JSON + tail), little-endian
"""

from __future__ import annotations

import select
import socket
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from splitserve.errors import BadMessage, Unreachable
from splitserve.kv.transfer.threads import Stop

HEADER = struct.Struct("<4sHHI")
_MAGIC = b"SSKV"
_VERSION = 1
_LONGEST_BODY = 16 << 20  # 4 million blocks
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Request:
    """Blocks of one handle. `blocks` by group, in the order in which they shall come."""

    handle_id: str
    token: str = field(repr=False)
    incarnation: int
    layout: str
    block_bytes: int
    checksums: bool
    blocks: tuple[tuple[int, tuple[int, ...]], ...]

    def encode(self) -> bytes:
        head = {
            "handle": self.handle_id,
            "token": self.token,
            "incarnation": self.incarnation,
            "layout": self.layout,
            "block_bytes": self.block_bytes,
            "checksums": self.checksums,
            "groups": [[group, len(blocks)] for group, blocks in self.blocks],
        }
        tail = np.array([block for _, blocks in self.blocks for block in blocks], "<u4").tobytes()
        return frame(orjson.dumps(head), tail)

    @classmethod
    def decode(cls, body: bytes) -> Request:
        """BadMessage when the body is no request."""
        try:
            head, tail = parts(body)
            numbers = np.frombuffer(tail, "<u4").tolist()
            blocks: list[tuple[int, tuple[int, ...]]] = []
            at = 0
            for group, count in head["groups"]:
                blocks.append((int(group), tuple(numbers[at : at + int(count)])))
                at += int(count)
            if at != len(numbers):
                raise BadMessage(f"the request counts {at} blocks and carries {len(numbers)}")
            return cls(
                str(head["handle"]), str(head["token"]), int(head["incarnation"]), str(head["layout"]),
                int(head["block_bytes"]), bool(head["checksums"]), tuple(blocks),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, struct.error) as error:
            raise BadMessage(f"not a block request: {error!r}") from error


@dataclass(frozen=True, slots=True)
class Reply:
    """`code` is "ok", or the wire code of an error (errors.TABLE)."""

    code: str
    message: str = ""

    def encode(self) -> bytes:
        return frame(orjson.dumps({"code": self.code, "message": self.message}), b"")

    @classmethod
    def decode(cls, body: bytes) -> Reply:
        """BadMessage when the body is no answer."""
        try:
            head, _ = parts(body)
            return cls(str(head["code"]), str(head["message"]))
        except (KeyError, TypeError, ValueError, struct.error) as error:
            raise BadMessage(f"not a block answer: {error!r}") from error


def body_length(header: bytes | bytearray) -> int:
    """Bytes that follow a header. BadMessage when it is not ours, of another version, or names too many."""
    magic, version, _, length = HEADER.unpack(header)
    if magic != _MAGIC:
        raise BadMessage(f"not a KV frame: it starts with {magic!r}")
    if version != _VERSION:
        raise BadMessage(f"the peer speaks version {version} of the KV frames, this build {_VERSION}")
    if length > _LONGEST_BODY:
        raise BadMessage(f"a KV frame of {length} bytes; {_LONGEST_BODY} are the most")
    return length


def frame(head: bytes, tail: bytes) -> bytes:
    """Header and body around a JSON object and what follows it."""
    body = _LENGTH.pack(len(head)) + head + tail
    return HEADER.pack(_MAGIC, _VERSION, 0, len(body)) + body


def parts(body: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON object and the tail of a frame's body. BadMessage, ValueError, struct.error."""
    (length,) = _LENGTH.unpack_from(body)
    head = orjson.loads(body[_LENGTH.size : _LENGTH.size + length])
    if not isinstance(head, dict):
        raise BadMessage("a KV frame's head is not an object")
    return head, body[_LENGTH.size + length :]


class Line:
    """A non-blocking socket used from one thread: each call ends when all bytes went through, when no byte did for
    `silence_s` seconds (Unreachable), or when told to stop."""

    def __init__(self, connection: socket.socket, peer: str, silence_s: float, stop: Stop) -> None:
        self._connection = connection
        self._peer = peer
        self._silence_s = silence_s
        self._stop = stop

    def send(self, data: memoryview) -> None:
        at = 0
        while at < len(data):
            self._stop.check()
            try:
                at += self._connection.send(data[at:])
            except BlockingIOError:
                self._wait(select.POLLOUT, at, len(data))
            except OSError as error:
                raise self._lost(f"{error}") from error

    def receive(self, into: memoryview) -> None:
        at = 0
        while at < len(into):
            self._stop.check()
            try:
                count = self._connection.recv_into(into[at:])
            except BlockingIOError:
                self._wait(select.POLLIN, at, len(into))
                continue
            except OSError as error:
                raise self._lost(f"{error}") from error
            if count == 0:
                raise self._lost(f"the connection was closed after {at} of {len(into)} bytes")
            at += count

    def receive_frame(self) -> bytes:
        """The body of one frame. BadMessage when it is not ours."""
        header = bytearray(HEADER.size)
        self.receive(memoryview(header))
        body = bytearray(body_length(header))
        self.receive(memoryview(body))
        return bytes(body)

    def _wait(self, events: int, done: int, total: int) -> None:
        poll = select.poll()
        poll.register(self._connection, events)
        if not poll.poll(self._silence_s * 1000):
            raise self._lost(f"no byte for {self._silence_s:g} s, after {done} of {total}")

    def _lost(self, why: str) -> Unreachable:
        self._stop.check()  # a socket that we shut down ourselves is no fault of the peer
        return Unreachable(f"{self._peer}: {why}")
