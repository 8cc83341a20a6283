"""The store: what must outlive any one process, in Redis, and never in the path of a token.

The owning router's memory is the truth while it lives. `save` only marks; one writer task sends the *latest* state of
each changed request, every 20 ms, in one command (protocol §5). A Redis that is away later costs nothing but staleness.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import orjson
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoScriptError, RedisError

from splitserve.config import redacted
from splitserve.errors import ConfigError, NeverReady, StoreUnavailable
from splitserve.store.keys import PRESENCE_EVERY_S, PRESENCE_TTL_S, SAVE_LUA, Keys

log = logging.getLogger("splitserve.store")

COMMIT_EVERY_S = 0.02
RETRY_EVERY_S = 0.5
BATCH = 500
BACKLOG = 20_000  # changed requests kept while Redis is away; the oldest go first


@dataclass(frozen=True, slots=True)
class StateRow:
    """The latest state of one request. `fields` are strings; `final` rows never change again."""

    rid: str
    owner: str
    seq: int
    ttl_s: float
    final: bool
    fields: Mapping[str, str]


class Savable(Protocol):
    """One state of a request, `row()` of it made when it is written: most states have been replaced by then."""

    @property
    def rid(self) -> str: ...

    def row(self) -> StateRow: ...


class Store:
    """One connection pool and its writer. `degraded` is true from the first failed write to the next good one."""

    def __init__(self, client: Redis, cluster: str) -> None:
        self._redis = client
        self._keys = Keys(cluster)
        self._changed: dict[str, Savable] = {}
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()  # nothing is waiting to be written
        self._idle.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._sha = ""
        self._sending = 0
        self._announced = ""  # our own router
        self._announced_since: float | None = None  # without a failure, on the loop's clock
        self.degraded = False
        self.refused = 0
        self.dropped = 0

    @classmethod
    async def connect(cls, url: str, *, cluster: str, connect_timeout_s: float) -> Store:
        """Connect, waiting for a server that is not there yet.

        Raises NeverReady after `connect_timeout_s`, ConfigError for a malformed URL or a wrong password.
        """
        try:
            client = Redis.from_url(
                url,
                socket_timeout=0.5,
                socket_connect_timeout=0.5,
                retry=Retry(NoBackoff(), 0),
                decode_responses=True,
                protocol=2,
            )
        except ValueError as error:
            raise ConfigError(f"the Redis URL {redacted(url)} is malformed: {error}") from error
        store = cls(client, cluster)
        loop = asyncio.get_running_loop()
        give_up = loop.time() + connect_timeout_s
        while True:
            try:
                store._sha = str(await client.script_load(SAVE_LUA))
                break
            except AuthenticationError as error:
                await client.aclose()
                raise ConfigError(f"Redis at {redacted(url)} refuses the password: {error}") from error
            except (RedisError, OSError, TimeoutError) as error:
                if loop.time() >= give_up:
                    await client.aclose()
                    raise NeverReady(
                        f"Redis at {redacted(url)} did not answer in {connect_timeout_s:g} s ({error}): "
                        "start it, or correct --redis"
                    ) from error
                log.info("waiting for Redis", extra={"at": redacted(url), "error": str(error)})
                await asyncio.sleep(RETRY_EVERY_S)
        store._tasks.append(asyncio.create_task(store._write_forever(), name="store-writer"))
        return store

    def save(self, state: Savable) -> None:
        """Remember the latest state of a request; written with the next group commit."""
        self._changed.pop(state.rid, None)
        self._changed[state.rid] = state
        while len(self._changed) > BACKLOG:
            self._changed.pop(next(iter(self._changed)))
            self.dropped += 1
        self._wake.set()
        self._idle.clear()

    @property
    def pending(self) -> int:
        """Changed requests that Redis has not acknowledged."""
        return len(self._changed) + self._sending

    async def read(self, rid: str) -> dict[str, str] | None:
        """The stored state of a request, None when there is none. Raises StoreUnavailable."""
        try:
            found = await self._redis.hgetall(self._keys.request(rid))
        except (RedisError, OSError, TimeoutError) as error:
            raise StoreUnavailable(f"Redis is away: {error}", retry_after_s=1) from error
        return {str(key): str(value) for key, value in found.items()} or None

    async def gone(self, router: str) -> bool:
        """Whether that router has not announced itself for seconds in which it could: we could. Raises StoreUnavailable."""
        now, since = asyncio.get_running_loop().time(), self._announced_since
        if router == self._announced or since is None or now - since < 2 * PRESENCE_EVERY_S:
            return False
        try:
            return not await self._redis.exists(self._keys.router(router))
        except (RedisError, OSError, TimeoutError) as error:
            raise StoreUnavailable(f"Redis is away: {error}", retry_after_s=1) from error

    def announce(self, router: str, incarnation: int) -> None:
        """Keep `router:{id}` alive until `close`."""

        async def announce_forever() -> None:
            loop = asyncio.get_running_loop()
            while True:
                try:
                    await self._redis.set(self._keys.router(router), incarnation, ex=int(PRESENCE_TTL_S))
                    self._announced_since = self._announced_since or loop.time()
                except (RedisError, OSError, TimeoutError):  # the writer reports a Redis that is away
                    self._announced_since = None
                await asyncio.sleep(PRESENCE_EVERY_S)

        self._announced = router
        self._tasks.append(asyncio.create_task(announce_forever(), name="store-presence"))

    async def close(self, flush_s: float = 1.0) -> None:
        """Write what is pending, for at most `flush_s`, and disconnect."""
        with suppress(TimeoutError):
            async with asyncio.timeout(flush_s):
                await self._idle.wait()
        pending = set(self._tasks)
        while pending:  # redis-py may take a cancel for its own time-out, and then goes on
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=RETRY_EVERY_S)
        await self._redis.aclose()

    async def _write_forever(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(RETRY_EVERY_S if self.degraded else COMMIT_EVERY_S)
            batch = [self._changed.pop(rid) for rid in list(self._changed)[:BATCH]]
            self._sending = len(batch)
            try:
                await self._commit(batch)
                self._degraded(False, "")
            except (RedisError, OSError, TimeoutError) as error:
                for state in reversed(batch):
                    if state.rid not in self._changed:  # a newer state wins
                        self._changed = {state.rid: state, **self._changed}
                self._degraded(True, str(error))
            self._sending = 0
            if not self._changed:
                self._wake.clear()
                self._idle.set()

    async def _commit(self, batch: list[Savable]) -> None:
        keys = [self._keys.request(state.rid) for state in batch]
        rows = orjson.dumps([_arguments(state.row()) for state in batch])
        try:
            refused = await self._redis.evalsha(self._sha, len(keys), *keys, rows)
        except NoScriptError:  # Redis restarted
            self._sha = str(await self._redis.script_load(SAVE_LUA))
            refused = await self._redis.evalsha(self._sha, len(keys), *keys, rows)
        self.refused += int(refused)

    def _degraded(self, now: bool, why: str) -> None:
        if now != self.degraded:
            self.degraded = now
            if now:
                log.warning("Redis is away: serving goes on, states wait", extra={"error": why})
            else:
                log.warning("Redis is back", extra={"pending": len(self._changed)})


def _arguments(row: StateRow) -> tuple[object, ...]:
    pairs = ("final", "1" if row.final else "0", *chain.from_iterable(row.fields.items()))
    return row.owner, row.seq, int(row.ttl_s * 1000), pairs
