"""The reader's side of the data plane: what every transport promises, whatever moves the bytes.

The promises (tests/kv/test_transfer_contract.py runs one suite over all of them):

- after `fetch` returned, each local block holds the bytes that its remote block had under the generation named;
- after `fetch` raised or was cancelled, no local block is written any more, so the caller may free them at once;
- Fenced, Unreachable, KvMismatch and ChecksumMismatch are the only errors that a peer can cause.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from splitserve.protocol.handle import KvHandle, KvSource

SourceKey = tuple[str, int]  # worker, incarnation


@dataclass(frozen=True, slots=True)
class BlockPair:
    """One block to fetch: number `remote` of the owner's pool, as it was under `generation`, into ours as `local`.

    Block numbers count over the whole pool: the groups of a layout share one pool of equal blocks.
    """

    group: int
    remote: int
    local: int
    generation: int


@dataclass(frozen=True, slots=True)
class FetchResult:
    bytes: int
    blocks: int
    seconds: float
    transport: str


class Transport(Protocol):
    """One way to move blocks out of other workers' pools into ours."""

    @property
    def name(self) -> str: ...

    async def attach(self, source: KvSource) -> None:
        """Get ready to read from a worker, while it still computes. Repeating is free. Unreachable, KvMismatch."""
        ...

    async def fetch(self, handle: KvHandle, pairs: Sequence[BlockPair]) -> FetchResult:
        """Move the blocks; attaches by itself where that was not done. Raises Fenced, Unreachable, KvMismatch,
        ChecksumMismatch."""
        ...

    def retain(self, live: Iterable[SourceKey]) -> None:
        """Let go of what belongs to dead owners that are not in `live`."""
        ...

    async def close(self) -> None:
        """Let go of everything. No fetch may be under way."""
        ...


def source_of(handle: KvHandle) -> KvSource:
    return KvSource(handle.owner, handle.incarnation, handle.addresses)


def address_of(source: KvSource, transport: str) -> str | None:
    """The source's address for a transport, if it has one."""
    return next((a.address for a in source.addresses if a.transport == transport), None)
