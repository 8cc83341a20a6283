"""What a decode worker reads other workers' KV with: chooses a transport for each owner and remembers it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from splitserve.config import TransferSettings
from splitserve.deadlines import Deadline
from splitserve.errors import ConfigError, Unreachable
from splitserve.faultpoints import Faults
from splitserve.kv.host import boot_id
from splitserve.kv.segment import Segment
from splitserve.kv.transfer.base import BlockPair, FetchResult, SourceKey, Transport, source_of
from splitserve.kv.transfer.choose import Choice, ways
from splitserve.kv.transfer.cuda_ipc import CudaIpcTransport
from splitserve.kv.transfer.nixl import NixlTransport
from splitserve.kv.transfer.shm import ShmTransport
from splitserve.kv.transfer.tcp import SILENCE_S, TcpTransport
from splitserve.protocol.handle import KvHandle, KvSource

logger = logging.getLogger("splitserve.kv")

_READERS = 16  # fetches whose bytes move at once; more of them wait


class KvReader:
    """Fetches blocks into `segment`, our own pool. `on_choice` hears of each transport chosen (a metric).

    ConfigError for nixl where it is not installed or the pool is a GPU's.
    """

    def __init__(
        self,
        segment: Segment,
        settings: TransferSettings,
        faults: Faults,
        *,
        on_choice: Callable[[Choice], None] | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._segment = segment
        self._forced = settings.kv_transport
        self._on_choice = on_choice
        at_once = segment.memory.transfers or _READERS
        self._executor = ThreadPoolExecutor(at_once, thread_name_prefix="kv-fetch")
        all_sums = settings.kv_checksum == "all"
        everything: tuple[Transport, ...] = (
            CudaIpcTransport(segment, segment.device, self._executor, faults, verify=all_sums)
            if segment.device
            else ShmTransport(segment, self._executor, faults, verify=all_sums),
            TcpTransport(segment, self._executor, faults, verify=settings.kv_checksum != "off", silence_s=silence_s),
        )
        if (
            self._forced == NixlTransport.name
        ):  # never by itself: on one host shm is faster, and nixl takes memory and files
            everything = (self._nixl(segment, faults, verify=all_sums, silence_s=silence_s),)
        self._transports = {transport.name: transport for transport in everything}
        self._chosen: dict[str, tuple[int, Transport]] = {}  # worker -> the incarnation it was chosen for

    def _nixl(self, segment: Segment, faults: Faults, *, verify: bool, silence_s: float) -> NixlTransport:
        if segment.device:
            raise ConfigError("--kv-transport nixl cannot carry KV into a GPU's memory here; use auto")
        return NixlTransport(segment, self._executor, faults, verify=verify, silence_s=silence_s)

    async def attach(self, source: KvSource) -> None:
        """Choose how to read from a worker and get ready, while it still computes. Repeating is free.

        Unreachable when no transport leads there, with the reason of each; KvMismatch when our pools differ.
        """
        transport = await self._transport(source)
        await transport.attach(source)

    async def fetch(
        self, handle: KvHandle, pairs: Sequence[BlockPair], deadline: Deadline | None = None
    ) -> FetchResult:
        """Move the handle's blocks into our pool. `deadline` is an instant of the loop's clock.

        Raises Fenced, Unreachable (the deadline too), KvMismatch, ChecksumMismatch. However it ends, our blocks are not
        written any more afterwards.
        """
        self._check_local(pairs)
        if not pairs:
            return FetchResult(0, 0, 0.0, "none")
        try:
            async with asyncio.timeout_at(deadline.at if deadline else None):
                transport = await self._transport(source_of(handle))
                return await transport.fetch(handle, pairs)
        except TimeoutError as error:
            what = deadline.what if deadline else "fetch"
            raise Unreachable(f"{handle.owner}: the time of {what} is over") from error
        except Unreachable:
            self._chosen.pop(handle.owner, None)  # choose again next time
            raise

    def retain(self, live: Iterable[SourceKey]) -> None:
        """Let go of the memory of dead owners; `live` are the (worker, incarnation) that jobs still name. Call it now
        and then, once a second say: until then a dead owner's whole pool stays in memory."""
        named = frozenset(live)
        for transport in self._transports.values():
            transport.retain(named)

    async def close(self) -> None:
        """Let go of everything. End the fetches first."""
        for transport in self._transports.values():
            await transport.close()
        self._executor.shutdown()

    async def _transport(self, source: KvSource) -> Transport:
        chosen = self._chosen.get(source.worker)
        if chosen is not None and chosen[0] == source.incarnation:
            return chosen[1]
        transport, why = await self._choose(source)
        self._chosen[source.worker] = (source.incarnation, transport)
        self._tell(Choice(source.worker, transport.name, why))
        return transport

    async def _choose(self, source: KvSource) -> tuple[Transport, str]:
        """The first way that works, and why it was taken."""
        failed: list[str] = []
        for way in ways(source.addresses, self._transports, self._forced, boot_id()):
            if not way.usable:
                failed.append(f"{way.transport}: {way.why}")
                continue
            try:
                await self._transports[way.transport].attach(source)
            except Unreachable as error:
                failed.append(f"{way.transport}: {error.message}")
            else:
                return self._transports[way.transport], "; ".join([way.why, *failed])
        raise Unreachable(f"no way to the KV of {source.worker}: {'; '.join(failed) or 'it offers no address'}")

    def _tell(self, choice: Choice) -> None:
        logger.info(
            "kv transport chosen",
            extra={"worker": choice.worker, "transport": choice.transport, "why": choice.why},
        )
        if self._on_choice is not None:
            self._on_choice(choice)

    def _check_local(self, pairs: Sequence[BlockPair]) -> None:
        for pair in pairs:
            if not 0 <= pair.local < self._segment.blocks:
                raise ValueError(f"local block {pair.local} is outside our pool of {self._segment.blocks}")
