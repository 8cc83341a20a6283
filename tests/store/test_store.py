from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from splitserve.errors import ConfigError, NeverReady, StoreUnavailable
from splitserve.store.store import StateRow, Store
from support.servers import Server, free_port
from support.waiting import until


@pytest.fixture
async def store(shared_redis: Server) -> AsyncGenerator[Store, None]:
    made = await Store.connect(shared_redis.url, cluster=uuid4().hex, connect_timeout_s=10)
    yield made
    await made.close()


@dataclass
class Saved:
    """A state whose row counts how often it is made."""

    made: StateRow
    times: int = 0

    @property
    def rid(self) -> str:
        return self.made.rid

    def row(self) -> StateRow:
        self.times += 1
        return self.made


def row(
    seq: int = 1,
    state: str = "queued",
    *,
    rid: str = "rid-1",
    owner: str = "router-a",
    final: bool = False,
    ttl: float = 60,
) -> Saved:
    return Saved(StateRow(rid, owner, seq, ttl, final, {"state": state, "model": "m"}))


async def written(store: Store) -> None:
    await until(lambda: not store.pending, "the group commit")


async def state_of(store: Store) -> str | None:
    await written(store)
    found = await store.read("rid-1")
    return found["state"] if found else None


async def test_a_saved_state_can_be_read_by_anybody(store: Store) -> None:
    store.save(row(1, "prefilling"))
    assert await state_of(store) == "prefilling"


async def test_of_many_changes_the_latest_is_written(store: Store) -> None:
    for seq, state in enumerate(["queued", "prefilling", "transferring", "decoding"], start=1):
        store.save(row(seq, state))
    assert await state_of(store) == "decoding"


async def test_a_state_that_was_replaced_before_its_write_is_never_made_a_row(store: Store) -> None:
    states = [row(seq) for seq in range(1, 6)]
    for state in states:
        store.save(state)
    await written(store)
    assert [state.times for state in states] == [0, 0, 0, 0, 1]


async def test_one_command_writes_many_states_and_refuses_each_by_itself(store: Store) -> None:
    for n in range(1200):  # more than a batch
        store.save(row(5, rid=f"r{n}"))
    await written(store)
    for n in range(1200):
        store.save(row(4 if n % 3 == 0 else 6, "decoding", rid=f"r{n}"))
    await written(store)
    assert store.refused == 400
    found = [await store.read(f"r{n}") for n in range(6)]
    assert [entry and entry["state"] for entry in found] == ["queued", "decoding", "decoding"] * 2


async def test_a_redis_that_forgot_the_script_is_told_it_again(store: Store, shared_redis: Server) -> None:
    client = Redis.from_url(shared_redis.url)
    try:
        await client.script_flush()
    finally:
        await client.aclose()
    store.save(row(1, "prefilling"))
    assert await state_of(store) == "prefilling"
    assert not store.degraded


async def test_an_unknown_request_is_none(store: Store) -> None:
    assert await store.read("never-was") is None


async def test_a_lower_seq_does_not_overwrite_a_higher(store: Store) -> None:
    store.save(row(5, "decoding"))
    await written(store)
    store.save(row(4, "queued"))
    assert await state_of(store) == "decoding"
    assert store.refused == 1


async def test_a_final_state_is_final(store: Store) -> None:
    store.save(row(5, "finished", final=True))
    await written(store)
    store.save(row(6, "decoding"))
    assert await state_of(store) == "finished"
    assert store.refused == 1


async def test_the_write_of_a_router_that_does_not_own_the_request_is_refused(store: Store) -> None:
    store.save(row(1, "queued"))
    await written(store)
    store.save(row(9, "failed", owner="router-b"))
    assert await state_of(store) == "queued"


async def test_the_same_write_twice_is_harmless(store: Store) -> None:
    store.save(row(1, "finished", final=True))
    await written(store)
    store.save(row(1, "finished", final=True))
    assert await state_of(store) == "finished"
    assert store.refused == 0


async def test_every_key_has_an_expiry(store: Store, shared_redis: Server) -> None:
    store.announce("router-a", 7)
    store.save(row(1, "finished", final=True, ttl=600))
    await state_of(store)
    client = Redis.from_url(shared_redis.url)
    try:
        ages = {key: await client.pttl(key) async for key in client.scan_iter()}
    finally:
        await client.aclose()
    assert len(ages) >= 2
    assert all(age > 0 for age in ages.values()), ages


async def test_a_router_is_gone_that_says_nothing_while_we_could(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitserve.store.store.PRESENCE_EVERY_S", 0.05)
    assert not await store.gone("router-b"), "we could not say anything yet"
    store.announce("router-a", 7)
    for _ in range(500):
        if await store.gone("router-b"):
            break
        await asyncio.sleep(0.01)
    assert await store.gone("router-b")
    assert not await store.gone("router-a")


async def test_while_redis_is_away_nobody_is_called_gone(own_redis: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitserve.store.store.PRESENCE_EVERY_S", 0.2)
    own_redis.start()
    store = await Store.connect(own_redis.url, cluster="c", connect_timeout_s=10)
    try:
        store.announce("router-a", 7)
        await asyncio.sleep(1)
        assert await store.gone("router-b")
        own_redis.kill()
        await asyncio.sleep(1)
        assert not await store.gone("router-b")
    finally:
        await store.close()


async def test_a_redis_that_goes_away_degrades_and_what_waited_is_written_when_it_is_back(own_redis: Server) -> None:
    own_redis.start()
    store = await Store.connect(own_redis.url, cluster="c", connect_timeout_s=10)
    try:
        own_redis.kill()
        store.save(row(1, "queued"))
        await until(lambda: store.degraded, "degraded")
        with pytest.raises(StoreUnavailable):
            await store.read("rid-1")
        store.save(row(2, "decoding"))  # the newer state wins over the one that waits
        own_redis.start()
        await until(lambda: not (store.degraded or store.pending), "the write of what waited")
        found = await store.read("rid-1")
        assert found is not None
        assert found["state"] == "decoding"
    finally:
        await store.close()


async def test_a_frozen_redis_costs_at_most_a_second_a_call(own_redis: Server) -> None:
    own_redis.start()
    store = await Store.connect(own_redis.url, cluster="c", connect_timeout_s=10)
    try:
        own_redis.freeze()
        async with asyncio.timeout(3):
            with pytest.raises(StoreUnavailable):
                await store.read("rid-1")
    finally:
        own_redis.wake()
        await store.close()


async def test_a_full_redis_is_the_same_as_one_that_is_away(own_redis: Server) -> None:
    own_redis.command += ["--maxmemory", "1", "--maxmemory-policy", "noeviction"]
    own_redis.start()
    store = await Store.connect(own_redis.url, cluster="c", connect_timeout_s=10)
    try:
        store.save(row(1))
        await until(lambda: store.degraded, "degraded")
        assert store.pending == 1
    finally:
        await store.close()


async def test_a_redis_that_never_comes_is_one_clear_error() -> None:
    with pytest.raises(NeverReady, match=r"did not answer in 0.2 s.*--redis") as caught:
        await Store.connect(f"redis://:hidden@127.0.0.1:{free_port()}/0", cluster="c", connect_timeout_s=0.2)
    assert "hidden" not in caught.value.message


async def test_a_wrong_password_is_said_at_once(shared_redis: Server) -> None:
    url = shared_redis.url.replace("secret", "wrong")
    with pytest.raises(ConfigError, match="password"):
        await Store.connect(url, cluster="c", connect_timeout_s=10)


async def test_a_malformed_url_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="malformed"):
        await Store.connect("http://127.0.0.1", cluster="c", connect_timeout_s=1)


async def test_states_that_wait_for_an_absent_redis_are_bounded(
    own_redis: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitserve.store.store.BACKLOG", 10)
    own_redis.start()
    store = await Store.connect(own_redis.url, cluster="c", connect_timeout_s=10)
    own_redis.kill()
    try:
        for n in range(30):
            store.save(row(rid=f"r{n}"))
        assert store.pending <= 10
        assert store.dropped >= 20
    finally:
        await store.close()
