"""Which transport is taken for an owner, and that one hears why."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from splitserve.config import TransferSettings
from splitserve.errors import KvMismatch, Unreachable
from splitserve.faultpoints import Faults
from splitserve.kv.memory import Run, runs
from splitserve.kv.segment import Segment
from splitserve.kv.transfer.base import source_of
from splitserve.kv.transfer.choose import Choice, Way, ways
from splitserve.kv.transfer.reader import KvReader
from splitserve.protocol.handle import KvAddress
from support.kv import LIFE, Owner, content, local_block, local_segment, owner, pairs_of

SHM = KvAddress("shm", "/run/p.kv", "here")
TCP = KvAddress("tcp", "127.0.0.1:9")
Forced = Literal["auto", "shm", "tcp"]


@pytest.mark.parametrize(
    ("addresses", "forced", "host", "usable"),
    [
        ((SHM, TCP), "auto", "here", ["shm", "tcp"]),
        ((SHM, TCP), "auto", "there", ["tcp"]),
        ((SHM, TCP), "tcp", "here", ["tcp"]),
        ((SHM, TCP), "shm", "here", ["shm"]),
        ((SHM, TCP), "shm", "there", []),
        ((TCP,), "auto", "here", ["tcp"]),
        ((KvAddress("nixl", "x"), TCP), "auto", "here", ["tcp"]),
        ((), "auto", "here", []),
    ],
)
def test_ways_are_judged_by_host_and_flag_in_the_owners_order(
    addresses: tuple[KvAddress, ...], forced: str, host: str, usable: list[str]
) -> None:
    judged = ways(addresses, ["shm", "tcp"], forced, host)
    assert [way.transport for way in judged if way.usable] == usable
    assert len(judged) == len(addresses)
    assert all(way.why for way in judged)


def test_a_way_that_is_not_taken_says_why() -> None:
    assert ways([SHM], ["shm"], "auto", "there") == (Way("shm", False, "shm needs one host, the owner is on another"),)
    assert ways([SHM], ["shm"], "tcp", "here") == (Way("shm", False, "--kv-transport=tcp"),)


def test_runs_join_neighbours_on_both_sides_only() -> None:
    pairs = [(1, 5), (2, 6), (3, 7), (4, 9), (5, 8), (6, 9)]
    assert list(runs(pairs, 10)) == [Run(1, 5, 3), Run(4, 9, 1), Run(5, 8, 2)]
    assert list(runs(pairs[:3], 2)) == [Run(1, 5, 2), Run(3, 7, 1)]
    assert list(runs([], 2)) == []


@asynccontextmanager
async def reader_with(
    forced: Forced, choices: list[Choice], segment: Segment | None = None
) -> AsyncGenerator[tuple[KvReader, Segment]]:
    segment = segment or local_segment()
    reader = KvReader(segment, TransferSettings(kv_transport=forced), Faults(), on_choice=choices.append)
    try:
        yield reader, segment
    finally:
        await reader.close()
        segment.close()


async def test_on_one_host_shared_memory_is_taken_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    choices: list[Choice] = []
    caplog.set_level(logging.INFO, "splitserve.kv")
    async with owner(tmp_path) as p, reader_with("auto", choices) as (reader, ours):
        for block in range(3):
            await reader.attach(source_of(p.handle))
            await reader.fetch(p.handle, pairs_of([(block, block)]))
        assert local_block(ours, 2) == content(2)
    assert choices == [Choice("prefill-0", "shm", "same host")]
    assert caplog.messages.count("kv transport chosen") == 1


async def test_a_socket_that_does_not_answer_leads_to_tcp_and_the_reason_is_told(tmp_path: Path) -> None:
    choices: list[Choice] = []
    async with owner(tmp_path) as p, reader_with("auto", choices) as (reader, ours):
        os.unlink(p.handle.addresses[0].address)  # as in a container that does not share the folder
        assert (await reader.fetch(p.handle, pairs_of([(1, 1)]))).transport == "tcp"
        assert local_block(ours, 1) == content(1)
    assert choices[0].transport == "tcp"
    assert "No such file" in choices[0].why


async def test_another_host_leads_to_tcp(tmp_path: Path) -> None:
    choices: list[Choice] = []
    async with owner(tmp_path) as p, reader_with("auto", choices) as (reader, _):
        await reader.attach(source_of(elsewhere(p).handle))
    assert [choice.transport for choice in choices] == ["tcp"]


async def test_a_forced_transport_that_leads_nowhere_says_what_was_tried(tmp_path: Path) -> None:
    async with owner(tmp_path) as p, reader_with("shm", []) as (reader, _):
        with pytest.raises(Unreachable, match=r"prefill-0: shm: shm needs one host.*; tcp: --kv-transport=shm"):
            await reader.attach(source_of(elsewhere(p).handle))
        with pytest.raises(Unreachable, match="it offers no address"):
            await reader.attach(replace(source_of(p.handle), addresses=()))


async def test_pools_that_differ_are_not_tried_again_over_tcp(tmp_path: Path) -> None:
    async with owner(tmp_path) as p, reader_with("auto", [], local_segment(layout="another")) as (reader, _):
        with pytest.raises(KvMismatch, match="layout"):
            await reader.attach(source_of(p.handle))
        assert p.exporter.counts.requests == 0


async def test_after_a_lost_owner_the_choice_is_made_anew(tmp_path: Path) -> None:
    choices: list[Choice] = []
    async with reader_with("tcp", choices) as (reader, _):
        async with owner(tmp_path) as p:
            await reader.fetch(p.handle, pairs_of([(1, 1)]))
        with pytest.raises(Unreachable):
            await reader.fetch(p.handle, pairs_of([(1, 1)]))
        async with owner(tmp_path) as again:
            await reader.fetch(again.handle, pairs_of([(1, 1)]))
    assert [choice.transport for choice in choices] == ["tcp", "tcp"]


async def test_an_owner_offers_only_the_transport_that_it_is_told_to(tmp_path: Path) -> None:
    for forced, offered in (("auto", ["shm", "tcp"]), ("shm", ["shm"]), ("tcp", ["tcp"])):
        async with owner(tmp_path, forced) as p:  # pyright: ignore[reportArgumentType]
            assert [address.transport for address in p.handle.addresses] == offered
            assert p.handle.incarnation == LIFE


def elsewhere(p: Owner) -> Owner:
    """The owner as if it ran on another host of the same network."""
    addresses = tuple(replace(address, host="another boot") for address in p.handle.addresses)
    return replace(p, handle=replace(p.handle, addresses=addresses))
