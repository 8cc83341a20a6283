"""What an owner tells a reader that connects for `nixl`: one frame, then silence until either side is gone."""

from __future__ import annotations

import struct
from dataclasses import asdict, dataclass, field

import orjson

from splitserve.errors import BadMessage
from splitserve.kv.transfer.wire import frame, parts


@dataclass(frozen=True, slots=True)
class Card:
    """`pool`, `generations`, `checksums`: addresses in the owner's process; `metadata`: its agent's."""

    incarnation: int
    layout: str
    blocks: int
    block_bytes: int
    checksummed: bool
    pool: int
    generations: int
    checksums: int
    metadata: bytes = field(repr=False)

    def encode(self) -> bytes:
        head = asdict(self)
        metadata = head.pop("metadata")
        return frame(orjson.dumps(head), metadata)

    @classmethod
    def decode(cls, body: bytes) -> Card:
        """BadMessage when the body is no card."""
        try:
            head, metadata = parts(body)
            numbers = ("blocks", "block_bytes", "pool", "generations", "checksums")
            return cls(
                incarnation=int(head["incarnation"]),
                layout=str(head["layout"]),
                checksummed=bool(head["checksummed"]),
                metadata=metadata,
                **{name: int(head[name]) for name in numbers},
            )
        except (KeyError, TypeError, ValueError, struct.error) as error:
            raise BadMessage(f"not a card of a nixl owner: {error!r}") from error
