"""`splitserve prefill`: reads prompts, samples first tokens, holds KV until it is fetched."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from splitserve.config import TransferSettings, WorkerProcessSettings
from splitserve.engine import door
from splitserve.kv.export import Exporter
from splitserve.kv.lease import Lease, LeaseTable, Pin
from splitserve.prefill.jobs import PrefillJobs
from splitserve.prefill.spans import PrefillSpans
from splitserve.protocol.effects import Tick
from splitserve.protocol.states import Role
from splitserve.runtime.addresses import address_of
from splitserve.runtime.folder import run_folder
from splitserve.runtime.identity import found_at
from splitserve.runtime.process import Signals
from splitserve.telemetry.metrics import Metrics, Rising
from splitserve.worker.rules import Limits
from splitserve.worker.service import Parts, RoleParts, run_worker


async def run(settings: WorkerProcessSettings, signals: Signals) -> None:
    """Serve until a stop signal; then finish the queue and wait until the handles are fetched. Raises StartupError."""
    await run_worker(settings, signals, Role.PREFILL, make_prefill)


@dataclass(frozen=True, slots=True)
class PinnedLeases:
    """The lease table as the data plane sees it: an unpin may free blocks, so the core hears of it."""

    table: LeaseTable
    on_unpin: Callable[[], None]

    def lookup(self, handle_id: str, token: str) -> Lease | None:
        return self.table.lookup(handle_id, token)

    def pin(self, handle_id: str, sever: Callable[[], None]) -> Pin:
        return self.table.pin(handle_id, sever)

    def unpin(self, pin: Pin) -> None:
        self.table.unpin(pin)
        self.on_unpin()


async def make_prefill(parts: Parts) -> RoleParts:
    """The core, and the data plane by which others read the pool."""
    transfer, machine = parts.settings.transfer, parts.machine
    name, leases = machine.identity.name, LeaseTable()
    pinned = PinnedLeases(leases, lambda: parts.put(Tick()))
    host = found_at(transfer.kv_host, parts.settings.worker, address_of(parts.settings.cluster.nats, "--nats"))
    exporter = Exporter(
        name, machine.segment, pinned, transfer, socket_dir(transfer, parts.stack), parts.faults, advertised_host=host
    )
    addresses = await exporter.start()
    parts.stack.push_async_callback(exporter.close)
    core = PrefillJobs(
        replace(machine.identity, addresses=addresses),
        parts.subjects,
        Limits(lease_ttl_s=transfer.kv_lease_ttl),
        leases=leases,
    )
    held_bytes = parts.metrics.gauge("splitserve_kv_held_bytes")
    held = parts.metrics.gauge("splitserve_kv_leases")
    readers = {t: parts.metrics.gauge("splitserve_kv_readers", transport=t) for t in ("shm", "tcp", "nixl")}
    rising = _rising(parts.metrics, leases, exporter)

    def refresh() -> None:
        held_bytes.set(leases.held_blocks * machine.segment.block_bytes)
        held.set(len(leases))
        readers["shm"].set(exporter.shm_readers)
        readers["tcp"].set(exporter.tcp_connections)
        readers["nixl"].set(exporter.nixl_readers)
        for counter in rising:
            counter.refresh()

    def hold(event: door.Event) -> None:
        if isinstance(event, door.Prefilled | door.Progress):
            exporter.hold(event.groups)

    subjects = (parts.subjects.worker_in(name), parts.subjects.worker_lease(name))
    watch = PrefillSpans(parts.tracer, name) if parts.tracer.recording else None
    return RoleParts(core, subjects, {}, on_event=hold, refresh=refresh, watch=watch)


def socket_dir(settings: TransferSettings, stack: AsyncExitStack) -> Path:
    """Where the shm socket lies: the folder told, made with mode 0700 if it is missing, else a run folder of its own that
    goes with `stack`."""
    if not settings.kv_socket_dir:
        return stack.enter_context(run_folder())
    told = Path(settings.kv_socket_dir)
    os.makedirs(told, mode=0o700, exist_ok=True)
    return told


def _rising(metrics: Metrics, leases: LeaseTable, exporter: Exporter) -> tuple[Rising, ...]:
    return (
        Rising(metrics.counter("splitserve_kv_lease_expired").inc, lambda: leases.expired_total),
        Rising(metrics.counter("splitserve_kv_sent_bytes", transport="tcp").inc, lambda: exporter.counts.bytes),
        Rising(metrics.counter("splitserve_kv_sends_refused").inc, lambda: exporter.counts.refused),
        Rising(metrics.counter("splitserve_kv_sends_severed").inc, lambda: exporter.counts.severed),
    )
