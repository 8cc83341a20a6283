"""What only a decode worker's core is told and asks for: the fetch of a handle's blocks."""

from __future__ import annotations

from dataclasses import dataclass

from splitserve.kv.transfer.base import BlockPair
from splitserve.protocol.effects import Answer, Ask, Publish
from splitserve.protocol.handle import KvHandle, KvSource
from splitserve.protocol.states import FailReason
from splitserve.worker.effects import ToEngine

Key = tuple[str, int]  # (rid, da): what engine and reader know a job by

# --- commands ---


@dataclass(frozen=True, slots=True)
class Attach:
    """KV will come from there: open the way now, while the prompt is still being read. A hint; nothing answers."""

    source: KvSource


@dataclass(frozen=True, slots=True)
class Fetch:
    """Copy and validate these blocks: `Fetched` or `FetchFailed` follows, exactly once, also after `AbandonFetch`.

    A job has one at a time. They hold `tokens` of its prompt.
    """

    key: Key
    handle: KvHandle
    pairs: tuple[BlockPair, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class AbandonFetch:
    """Nobody wants it any more: stop soon, and say when nothing is being written any more."""

    key: Key


Command = Publish | Ask | Answer | ToEngine | Attach | Fetch | AbandonFetch

# --- events ---


@dataclass(frozen=True, slots=True)
class Fetched:
    """All blocks are here and valid."""

    key: Key
    bytes: int
    blocks: int
    transport: str
    seconds: float


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """The copy ended; what lies in the targets is worth nothing."""

    key: Key
    reason: FailReason
    message: str
