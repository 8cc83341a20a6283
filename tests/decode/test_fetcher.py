"""Fetches as the decode service runs them, from a real owner: each ends in exactly one event."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from splitserve.config import TransferSettings
from splitserve.decode.effects import AbandonFetch, Attach, Fetch, Fetched, FetchFailed
from splitserve.decode.fetcher import REASONS, Fetcher
from splitserve.errors import KvError
from splitserve.faultpoints import Faults
from splitserve.kv.segment import Segment
from splitserve.kv.transfer.base import source_of
from splitserve.kv.transfer.reader import KvReader
from splitserve.protocol.handle import KvHandle
from splitserve.protocol.states import FailReason, Role
from splitserve.telemetry.metrics import Metrics
from support.kv import BLOCK_BYTES, BLOCKS, content, local_block, local_segment, other_life, owner, pairs_of
from support.waiting import until

KEY = ("a", 1)
BLOCK = 4


class Fetching:
    def __init__(self, segment: Segment, faults: str) -> None:
        self.segment = segment
        self.events: list[object] = []
        self.metrics = Metrics(Role.DECODE, model_name="toy", engine="d", max_model_len=64)
        reader = KvReader(segment, TransferSettings(), Faults(faults))
        self.fetcher = Fetcher(reader, self.events.append, self.metrics)

    def fetch(self, handle: KvHandle, count: int = BLOCKS) -> None:
        pairs = pairs_of([(block, block) for block in range(count)])
        self.fetcher.fetch(Fetch(KEY, handle, tuple(pairs), BLOCKS * BLOCK - 1))

    async def outcome(self) -> Fetched | FetchFailed:
        await until(lambda: bool(self.events), "the end of the fetch")
        (event,) = self.events
        assert isinstance(event, Fetched | FetchFailed)
        return event

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, {"model_name": "toy", "engine": "d", **labels})


@asynccontextmanager
async def fetching(faults: str = "") -> AsyncGenerator[Fetching]:
    segment = local_segment()
    made = Fetching(segment, faults)
    try:
        yield made
    finally:
        await made.fetcher.close()
        segment.close()


async def test_a_fetch_brings_the_bytes_and_counts_them(tmp_path: Path) -> None:
    async with owner(tmp_path) as p, fetching() as made:
        made.fetcher.attach(Attach(source_of(p.handle)))
        made.fetch(p.handle, BLOCKS)
        event = await made.outcome()
        assert isinstance(event, Fetched)
        assert (event.key, event.blocks, event.bytes, event.transport) == (KEY, BLOCKS, BLOCKS * BLOCK_BYTES, "shm")
        assert local_block(made.segment, 5) == content(5)
        assert made.value("splitserve_kv_transfer_bytes_total", transport="shm") == event.bytes
        assert made.value("splitserve_kv_transfer_seconds_count", transport="shm") == 1
        assert made.value("vllm:external_prefix_cache_hits_total") == BLOCKS * BLOCK - 1


async def test_a_block_with_other_content_is_fenced_and_counted(tmp_path: Path) -> None:
    async with owner(tmp_path) as p, fetching() as made:
        p.segment.generations[3] += 1
        made.fetch(p.handle)
        event = await made.outcome()
        assert isinstance(event, FetchFailed)
        assert event.reason is FailReason.FENCED
        assert made.value("splitserve_kv_fenced_total") == 1
        assert made.value("splitserve_kv_failed_total", reason="fenced") == 1
        assert made.value("vllm:external_prefix_cache_hits_total") == 0


async def test_an_owners_other_life_is_no_source(tmp_path: Path) -> None:
    async with owner(tmp_path) as p, fetching() as made:
        made.fetch(other_life(p.handle))
        event = await made.outcome()
        assert isinstance(event, FetchFailed)
        assert event.reason in (FailReason.MISMATCH, FailReason.UNREACHABLE)


async def test_a_fetch_that_is_abandoned_at_once_still_ends(tmp_path: Path) -> None:
    async with owner(tmp_path) as p, fetching() as made:
        made.fetch(p.handle)
        made.fetcher.abandon(AbandonFetch(KEY))
        event = await made.outcome()
        assert isinstance(event, FetchFailed)
        assert event.message == "abandoned"


async def test_a_fetch_that_is_abandoned_midway_ends_and_writes_no_more(tmp_path: Path) -> None:
    async with owner(tmp_path) as p, fetching("kv.read_slow:0.02") as made:
        made.fetch(p.handle)
        await until(lambda: local_block(made.segment, 0) == content(0), "the first block")
        made.fetcher.abandon(AbandonFetch(KEY))
        made.fetcher.abandon(AbandonFetch(KEY))
        assert isinstance(await made.outcome(), FetchFailed)
        assert local_block(made.segment, BLOCKS - 1) != content(BLOCKS - 1)


async def test_an_owner_that_cannot_be_attached_costs_only_a_line(tmp_path: Path) -> None:
    async with fetching() as made:
        async with owner(tmp_path) as p:
            handle = p.handle
        made.fetcher.attach(Attach(source_of(handle)))
        made.fetch(handle)
        event = await made.outcome()
        assert isinstance(event, FetchFailed)
        assert event.reason is FailReason.UNREACHABLE


def test_every_error_of_the_data_plane_has_a_reason_on_the_wire() -> None:
    assert set(REASONS) == set(KvError.__subclasses__())
