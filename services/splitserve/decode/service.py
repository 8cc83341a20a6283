"""`splitserve decode`: fetches KV, writes answers; reads prompts itself where that is better."""

from __future__ import annotations

from splitserve.config import WorkerProcessSettings
from splitserve.decode.effects import AbandonFetch, Attach, Fetch
from splitserve.decode.fetcher import Fetcher
from splitserve.decode.jobs import DecodeJobs
from splitserve.decode.spans import DecodeSpans
from splitserve.kv.transfer.reader import KvReader
from splitserve.protocol.states import Role
from splitserve.runtime.process import Signals
from splitserve.worker.service import Parts, RoleParts, run_worker


async def run(settings: WorkerProcessSettings, signals: Signals) -> None:
    """Serve until a stop signal; then finish the answers that are under way. Raises StartupError."""
    await run_worker(settings, signals, Role.DECODE, make_decode)


async def make_decode(parts: Parts) -> RoleParts:
    """The core, and the reader of others' KV."""
    identity = parts.machine.identity
    reader = KvReader(parts.machine.segment, parts.settings.transfer, parts.faults)
    fetcher = Fetcher(reader, parts.put, parts.metrics)
    parts.stack.push_async_callback(fetcher.close)
    core = DecodeJobs(identity, parts.subjects)
    awaiting = parts.metrics.gauge("splitserve_requests_awaiting_kv")
    return RoleParts(
        core,
        (parts.subjects.worker_in(identity.name), parts.subjects.worker_kv(identity.name)),
        {Attach: fetcher.attach, Fetch: fetcher.fetch, AbandonFetch: fetcher.abandon},
        refresh=lambda: awaiting.set(core.awaiting),
        on_beat=lambda: reader.retain(core.sources),
        watch=DecodeSpans(parts.tracer, identity.name) if parts.tracer.recording else None,
    )
