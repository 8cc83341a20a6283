"""Fetches under way: a task each, told to the core when its last byte is written or will never be."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from splitserve.decode.effects import AbandonFetch, Attach, Fetch, Fetched, FetchFailed, Key
from splitserve.decode.observe import FetchMetrics
from splitserve.errors import ChecksumMismatch, Fenced, KvError, KvMismatch, Unreachable
from splitserve.kv.transfer.reader import KvReader
from splitserve.protocol.states import FailReason, is_probe
from splitserve.telemetry.metrics import Metrics

log = logging.getLogger("splitserve.decode")

REASONS: Mapping[type[KvError], FailReason] = {
    Fenced: FailReason.FENCED,
    Unreachable: FailReason.UNREACHABLE,
    KvMismatch: FailReason.MISMATCH,
    ChecksumMismatch: FailReason.CHECKSUM,
}


class Fetcher:
    """Carries out Attach, Fetch and AbandonFetch; `put` brings the core Fetched or FetchFailed, once a fetch."""

    def __init__(self, reader: KvReader, put: Callable[[object], None], metrics: Metrics) -> None:
        self._reader = reader
        self._put = put
        self._fetches: dict[Key, asyncio.Task[Fetched | FetchFailed]] = {}
        self._attaching: set[asyncio.Task[None]] = set()
        self._metrics = FetchMetrics(metrics)

    def attach(self, command: Attach) -> None:
        task = asyncio.create_task(self._attach(command), name="kv-attach")
        self._attaching.add(task)
        task.add_done_callback(self._attaching.discard)

    def fetch(self, command: Fetch) -> None:
        task = asyncio.create_task(self._fetch(command), name="kv-fetch")
        self._fetches[command.key] = task
        task.add_done_callback(lambda task: self._ended(command.key, task))

    def abandon(self, command: AbandonFetch) -> None:
        task = self._fetches.get(command.key)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        """End everything and let go of what is mapped."""
        tasks: list[asyncio.Task[Any]] = [*self._fetches.values(), *self._attaching]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._reader.close()

    async def _attach(self, command: Attach) -> None:
        try:
            await self._reader.attach(command.source)
        except KvError as error:  # the fetch will meet it again, and tell
            log.warning("cannot attach", extra={"worker": command.source.worker, "why": error.message})

    def _ended(self, key: Key, task: asyncio.Task[Fetched | FetchFailed]) -> None:
        """A cancelled task, even one that never began, writes nothing any more: that is what the core waits for."""
        del self._fetches[key]
        abandoned = FetchFailed(key, FailReason.UNREACHABLE, "abandoned")
        self._put(abandoned if task.cancelled() else task.result())

    async def _fetch(self, command: Fetch) -> Fetched | FetchFailed:
        key, handle = command.key, command.handle
        counted = not is_probe(key[0])
        if counted:
            self._metrics.asked(command.tokens)
        try:
            result = await self._reader.fetch(handle, command.pairs)
        except KvError as error:
            reason = REASONS[type(error)]
            if counted:
                self._metrics.failed(reason)
            log.warning("fetch failed", extra={"rid": key[0], "reason": reason, "why": error.message})
            return FetchFailed(key, reason, error.message)
        except Exception as error:  # no peer can cause it; the job must still hear of its end
            log.exception("fetch crashed", extra={"rid": key[0]})
            return FetchFailed(key, FailReason.UNREACHABLE, f"{type(error).__name__}: {error}")
        if counted:
            self._metrics.got(command.tokens, result)
        return Fetched(key, result.bytes, result.blocks, result.transport, result.seconds)
