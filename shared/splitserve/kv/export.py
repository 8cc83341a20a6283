"""The owner's side of the data plane: lets other workers read this worker's KV pool, by every transport that is allowed."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from splitserve.config import TransferSettings
from splitserve.errors import ConfigError
from splitserve.faultpoints import Faults
from splitserve.kv.checksum import HeldChecksums
from splitserve.kv.host import boot_id
from splitserve.kv.segment import Segment
from splitserve.kv.transfer.nixl_server import NixlServer
from splitserve.kv.transfer.shm_server import ShmServer
from splitserve.kv.transfer.tcp_server import Counts, Leases, TcpServer
from splitserve.protocol.handle import GroupBlocks, KvAddress

logger = logging.getLogger("splitserve.kv")

_SENDERS = 8  # transfers that are sent at once; more of them wait


class Exporter:
    """Serves `segment`'s descriptor on a unix socket in `socket_dir`, named after the worker, leased blocks over tcp,
    and by nixl, where that is asked for, the whole pool.

    Readers are told `advertised_host`, where there is one, instead of the address that tcp listens on. The segment must be
    `checksummed` where `settings.kv_checksum` is "all" (`Segment.create(…, checksummed=…)`).
    """

    def __init__(
        self,
        worker: str,
        segment: Segment,
        leases: Leases,
        settings: TransferSettings,
        socket_dir: Path,
        faults: Faults,
        *,
        advertised_host: str = "",
    ) -> None:
        self._settings = settings
        self._checksums = HeldChecksums(segment, faults)
        self._segment = segment
        self._executor = ThreadPoolExecutor(segment.memory.transfers or _SENDERS, thread_name_prefix="kv-send")
        self._shm = ShmServer(segment, socket_dir / f"{worker}.kv")
        self._tcp = TcpServer(segment, leases, self._executor, faults, settings.kv_host, settings.kv_port)
        self._nixl = NixlServer(segment, self._executor, settings.kv_host, settings.kv_port)
        self._host = advertised_host or settings.kv_host

    async def start(self) -> tuple[KvAddress, ...]:
        """Listen; returns the addresses for beats and handles, best first. ConfigError, PortTaken."""
        addresses: list[KvAddress] = []
        try:
            mapped = self._mapped()
            if mapped and self._settings.kv_transport in ("auto", mapped):
                self._shm.start()
                addresses.append(KvAddress(mapped, str(self._shm.path), boot_id()))
            if self._settings.kv_transport in ("auto", "tcp"):
                _warn_if_open(self._settings.kv_host)
                addresses.append(KvAddress("tcp", self._advertised(self._tcp.start())))
            if self._settings.kv_transport == "nixl" and self._segment.device is None:
                _warn_if_open(self._settings.kv_host)
                addresses.append(KvAddress("nixl", self._advertised(await self._nixl.start())))
        except BaseException:
            await self.close()
            raise
        if not addresses:
            await self.close()
            where = "a GPU's memory" if self._segment.device else "host memory"
            raise ConfigError(
                f"--kv-transport {self._settings.kv_transport} cannot carry KV out of {where} here; use auto"
            )
        return tuple(addresses)

    def _advertised(self, port: int) -> str:
        return f"[{self._host}]:{port}" if ":" in self._host else f"{self._host}:{port}"

    def _mapped(self) -> str | None:
        """The transport by which processes of this host read our pool in place."""
        device = self._segment.device
        if device is None:
            return "shm"
        return "cuda_ipc" if device.ipc_handle else None

    def hold(self, groups: Iterable[GroupBlocks]) -> None:
        """Call it when blocks are final and before their handle goes out: takes checksums with `--kv-checksum=all`.

        Blocking, about 0.1 ms a MB then and free otherwise; made for the engine's thread.
        """
        for group in groups:
            self._checksums.take(group.blocks)

    @property
    def counts(self) -> Counts:
        """What the tcp server did."""
        return self._tcp.counts

    @property
    def shm_readers(self) -> int:
        """Processes that have the pool mapped."""
        return self._shm.readers

    @property
    def tcp_connections(self) -> int:
        """Open connections of readers, idle ones included."""
        return self._tcp.connections

    @property
    def nixl_readers(self) -> int:
        """Processes that hold the card by which nixl reads the pool."""
        return self._nixl.readers

    async def close(self) -> None:
        """Stop serving: senders are cut off, sockets removed. Readers of shared memory read on."""
        await self._shm.close()
        await self._tcp.close()
        await self._nixl.close()
        self._executor.shutdown()


def _warn_if_open(host: str) -> None:
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback:
        logger.warning(
            "the KV data plane is open to other hosts without encryption: KV reveals prompts", extra={"host": host}
        )
