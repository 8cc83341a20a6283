"""The routers that a worker has heard of: when each was last alive, and when it is owed a digest.

A router's silence is judged only while this worker hears its own beat (protocol, "Liveness"): a sick bus, or a frozen
process that wakes, looks from inside as if everybody else had died.
"""

from __future__ import annotations

from math import inf

from splitserve.worker.rules import Limits


class Routers:
    """`heard` makes a router known, `beat` keeps a known one alive, `silent` names each that fell silent once."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._heard: dict[str, float] = {}
        self._silent: set[str] = set()
        self._own = -inf
        self._trusted_from = inf
        self._blind = True  # no judgement, and no timer for one, until our own beat comes
        self._digest_at = inf

    def heard(self, router: str, now: float) -> None:
        """A message of this router came: it has work here, or asks about it."""
        if router not in self._heard and self._digest_at == inf:
            self._digest_at = now + self._limits.digest_s
        self._heard[router] = now
        self._silent.discard(router)

    def beat(self, router: str, now: float) -> None:
        if router in self._heard:
            self._heard[router] = now
            self._silent.discard(router)

    def own_beat(self, now: float) -> None:
        if now - self._own > self._limits.own_beat_s:
            self._trusted_from = now + self._limits.bus_settle_s
        self._own = now
        self._blind = False

    def bus_down(self) -> None:
        self._own = -inf
        self._blind = True

    def silent(self, now: float) -> list[str]:
        """Routers not heard for too long, each named once a silence; none while our own bus may be the cause."""
        self._blind = self._blind or now - self._own > self._limits.own_beat_s
        if self._blind or now < self._trusted_from:
            return []
        found = [
            router
            for router, at in self._heard.items()
            if router not in self._silent and now - at >= self._limits.router_silence_s
        ]
        self._silent.update(found)
        return found

    def digests_due(self, now: float) -> list[str]:
        """Routers that are owed a digest now, each second, whether or not there is anything to tell."""
        if now < self._digest_at:
            return []
        for router in [r for r in self._silent if now - self._heard[r] >= self._limits.router_forgotten_s]:
            del self._heard[router]
            self._silent.discard(router)
        self._digest_at = now + self._limits.digest_s if self._heard else inf
        return [router for router in self._heard if router not in self._silent]

    def next_at(self) -> float | None:
        """When `silent` or `digests_due` next has something to say, if nothing is heard until then."""
        silence = inf
        if not self._blind:
            alive = (at for router, at in self._heard.items() if router not in self._silent)
            silence = max(min(alive, default=inf) + self._limits.router_silence_s, self._trusted_from)
        at = min(silence, self._digest_at)
        return None if at == inf else at
