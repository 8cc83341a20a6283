"""Leases on readable KV blocks: for how long an owner holds what a handle names.

Time is the owner's own monotonic clock, given as `now`; a handle carries the ttl, never an instant. A lease ends by
release, by `end` (a cancel), or by time. Its key comes out of `expire` exactly once, when nothing reads the blocks any
more: a two-sided transport pins a lease while it sends, and the end of a pinned lease first severs the senders.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace
from hmac import compare_digest
from math import inf

from splitserve.protocol.handle import GroupBlocks


@dataclass(frozen=True, slots=True)
class Lease:
    """What one handle holds. `token` is the handle's (hex)."""

    handle_id: str
    key: Hashable
    token: str = field(repr=False)
    groups: tuple[GroupBlocks, ...]
    ttl_s: float

    @property
    def blocks(self) -> int:
        return sum(len(group.blocks) for group in self.groups)


@dataclass(frozen=True, slots=True, eq=False)
class Pin:
    """One sender that reads a lease's blocks. `sever` stops it soon; it then unpins."""

    handle_id: str
    sever: Callable[[], None]


@dataclass(slots=True)
class _Held:
    lease: Lease
    expiry: float
    pins: set[Pin] = field(default_factory=set[Pin])


class LeaseTable:
    """All leases of one owner. Not thread-safe: the loop's side only.

    After whatever may end a lease (`release`, `end`, `unpin`, time) the owner calls `expire(now)` and frees its keys.
    """

    def __init__(self) -> None:
        self._live: dict[str, _Held] = {}
        self._ending: dict[str, _Held] = {}  # over for readers, but still pinned
        self._freed: list[Hashable] = []
        self.expired_total = 0
        self.released_total = 0

    def __len__(self) -> int:
        return len(self._live) + len(self._ending)

    def grant(
        self, handle_id: str, key: Hashable, token: str, groups: Iterable[GroupBlocks], ttl_s: float, now: float
    ) -> Lease:
        """Hold `groups` for `ttl_s` seconds from `now`. ValueError when the handle was granted already."""
        if handle_id in self._live or handle_id in self._ending:
            raise ValueError(f"handle {handle_id} is held already")
        lease = Lease(handle_id, key, token, tuple(groups), ttl_s)
        self._live[handle_id] = _Held(lease, now + ttl_s)
        return lease

    def extend(self, handle_id: str, groups: Iterable[GroupBlocks], ttl_s: float, now: float) -> None:
        """`groups` are what a lease holds now, for `ttl_s` seconds from `now` (inf: until extended again, or ended).

        KeyError when it is not live.
        """
        held = self._live[handle_id]
        held.lease = replace(held.lease, groups=tuple(groups), ttl_s=ttl_s)
        held.expiry = now + ttl_s

    def renew(self, handle_ids: Iterable[str], now: float) -> tuple[str, ...]:
        """expiry = max(old, now + ttl) for each; returns the ids that are not held (any more)."""
        unknown: list[str] = []
        for handle_id in handle_ids:
            held = self._live.get(handle_id)
            if held is None or held.expiry <= now:
                unknown.append(handle_id)
            else:
                held.expiry = max(held.expiry, now + held.lease.ttl_s)
        return tuple(unknown)

    def release(self, handle_id: str, token: str) -> bool:
        """The reader is done. False when the handle is not held, or the token is not its own."""
        if self.lookup(handle_id, token) is None:
            return False
        self.released_total += 1
        return self.end(handle_id)

    def end(self, handle_id: str) -> bool:
        """The owner itself drops the lease (a cancelled job). False when it is not held."""
        held = self._live.pop(handle_id, None)
        if held is None:
            return False
        if held.pins:
            self._ending[handle_id] = held
            for pin in tuple(held.pins):  # a sever may unpin at once
                pin.sever()
        else:
            self._freed.append(held.lease.key)
        return True

    def expire(self, now: float) -> list[Hashable]:
        """End every lease whose time is over; returns the keys whose blocks nobody reads, each exactly once."""
        over = [handle_id for handle_id, held in self._live.items() if held.expiry <= now]
        self.expired_total += len(over)
        for handle_id in over:
            self.end(handle_id)
        freed, self._freed = self._freed, []
        return freed

    def next_expiry(self) -> float | None:
        """When `expire` next has something to do by time alone; None without leases. Past when it has already."""
        if self._freed:
            return float("-inf")
        at = min((held.expiry for held in self._live.values()), default=inf)
        return None if at == inf else at

    def lookup(self, handle_id: str, token: str) -> Lease | None:
        """The live lease of a handle, if the token is its own."""
        held = self._live.get(handle_id)
        if held is None or not compare_digest(held.lease.token.encode(), token.encode()):
            return None
        return held.lease

    def pin(self, handle_id: str, sever: Callable[[], None]) -> Pin:
        """Keep a lease's blocks from being freed until `unpin`. KeyError when it is not live (`lookup` first)."""
        pin = Pin(handle_id, sever)
        self._live[handle_id].pins.add(pin)
        return pin

    def unpin(self, pin: Pin) -> None:
        """The sender has read its last byte."""
        for table in (self._live, self._ending):
            held = table.get(pin.handle_id)
            if held is not None and pin in held.pins:
                held.pins.remove(pin)
                break
        ending = self._ending.get(pin.handle_id)
        if ending is not None and not ending.pins:
            del self._ending[pin.handle_id]
            self._freed.append(ending.lease.key)

    @property
    def held_blocks(self) -> int:
        """Blocks that leases name; one that two leases share counts twice."""
        return sum(held.lease.blocks for table in (self._live, self._ending) for held in table.values())

    @property
    def pins(self) -> int:
        """Senders at work."""
        return sum(len(held.pins) for table in (self._live, self._ending) for held in table.values())
