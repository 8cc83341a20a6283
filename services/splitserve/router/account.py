"""One worker as this router sees it: its beat, and the account of what we promised there.

Own promises count at once; beats only correct them (other routers' load).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

from splitserve.protocol.messages import Beat
from splitserve.protocol.states import Role
from splitserve.router.prefixes import SeenPrefixes

POOL_SHARE = 0.95  # of a decode pool may be promised
MEASURED_TOKENS = 32  # shorter prefills say little about the rate
FOREIGN_CONTEXT = 256  # tokens assumed of another router's sequence

Life = tuple[str, int]  # (name, incarnation)
PromiseKey = tuple[str, int | str]  # request id, and which of its attempts


@dataclass(frozen=True, slots=True)
class Load:
    """Taken of a worker: prompt tokens yet to be computed there, blocks, and tokens of context."""

    tokens: int = 0
    blocks: int = 0
    context: int = 0

    def __add__(self, other: Load) -> Load:
        return Load(self.tokens + other.tokens, self.blocks + other.blocks, self.context + other.context)

    def less(self, other: Load) -> Load:
        """The difference, nothing below zero."""
        return Load(
            max(0, self.tokens - other.tokens),
            max(0, self.blocks - other.blocks),
            max(0, self.context - other.context),
        )


@dataclass(slots=True)
class Worker:
    """One worker in its present life."""

    beat: Beat
    heard_at: float
    alive: bool = True
    suspect: bool = False
    pinging: bool = False
    busy_since: float = 0.0
    full_until: float = 0.0
    placed: int = 0  # how many were placed here: spreads ties
    promises: dict[PromiseKey, Load] = field(default_factory=dict[PromiseKey, Load])
    unread: dict[PromiseKey, int] = field(default_factory=dict[PromiseKey, int])  # prompt tokens, the oldest first
    reading_since: float = 0.0  # the oldest of them
    hungry: bool = True  # it may have nothing to read, and nobody has looked yet for what waits elsewhere
    own: Load = field(default_factory=Load)  # sum of the promises
    foreign: Load = field(default_factory=Load)  # other routers' load, as of the last beat
    seen: SeenPrefixes = field(default_factory=SeenPrefixes)
    prefill_rate: float = 2000.0  # tokens/s while it decodes nothing, corrected as jobs end
    rate_beside: float = 600.0  # the same of a decode worker beside its decodes
    met_at: float = field(init=False)  # in this life

    def __post_init__(self) -> None:
        self.met_at = self.heard_at

    @property
    def life(self) -> Life:
        return (self.beat.name, self.beat.incarnation)

    @property
    def usable(self) -> bool:
        """May get new work."""
        return self.alive and not self.suspect and self.beat.ready and not self.beat.draining

    @property
    def load(self) -> Load:
        return self.own + self.foreign

    @property
    def rate(self) -> float:
        """Prompt tokens a second of the next prompt. A decode worker at work may have to give borrowed cores back."""
        return self.rate_beside if self.beat.role == Role.DECODE and not self.idle else self.prefill_rate

    def queued_tokens(self, now: float) -> int:
        """Prompt tokens that are probably left: it reads one prompt at a time, in our order, at its rate."""
        return self.load.tokens - self._read(now)

    def _read(self, now: float) -> int:
        """What is probably read of the oldest."""
        return min(next(iter(self.unread.values()), 0), int(self.rate * (now - self.reading_since)))

    def waiting(self, now: float) -> Iterator[tuple[PromiseKey, int]]:
        """Our prompts behind the one that it reads, in order: the promise, and the tokens that are read before it."""
        before = next(iter(self.unread.values()), 0) - self._read(now)
        for key, tokens in islice(self.unread.items(), 1, None):
            yield key, before
            before += tokens

    @property
    def free(self) -> bool:
        """It may be given a prompt and has none to read, of nobody."""
        return self.usable and not self.load.tokens

    @property
    def idle(self) -> bool:
        return not self.promises and self.foreign == Load()

    def has_room(self, blocks: int) -> bool:
        """By our own account. A worker that has nothing of ours is always asked: it knows best."""
        total = self.beat.total_blocks
        return not self.promises or not total or self.load.blocks + blocks <= POOL_SHARE * total

    def promise(self, key: PromiseKey, load: Load, now: float) -> None:
        """In place of what was promised under this key."""
        self.drop(key, now)
        if not self.promises:
            self.busy_since = now
        self.promises[key] = load
        self.own += load
        self.placed += 1
        if load.tokens:
            if not self.unread:
                self.reading_since = now
            self.unread[key] = load.tokens

    def drop(self, key: PromiseKey, now: float) -> None:
        self.computed(key, now)
        load = self.promises.pop(key, None)
        if load is not None:
            self.own = self.own.less(load)

    def computed(self, key: PromiseKey, now: float) -> None:
        """The prompt of this promise needs no more computing."""
        if key not in self.unread:
            return
        if key == next(iter(self.unread)):
            self.reading_since = now
        self.own = self.own.less(Load(tokens=self.unread.pop(key)))
        self.hungry = not self.unread
        self.promises[key] = replace(self.promises[key], tokens=0)

    def measured(self, tokens: int, seconds: float) -> None:
        """A prefill of `tokens` uncached tokens took `seconds`."""
        if tokens < MEASURED_TOKENS or seconds <= 0:
            return
        if self.beat.role == Role.DECODE and len(self.promises) > 1:
            self.rate_beside += 0.3 * (tokens / seconds - self.rate_beside)
        else:
            self.prefill_rate += 0.3 * (tokens / seconds - self.prefill_rate)

    def correct(self, beat: Beat) -> None:
        """Take a new beat of this life: what it has beyond our own promises is others'."""
        self.beat = beat
        self.hungry = True
        self.foreign = Load(
            tokens=max(0, beat.queued_tokens - self.own.tokens),
            blocks=max(0, beat.promised_blocks - self.own.blocks),
            context=max(0, beat.running - len(self.promises)) * FOREIGN_CONTEXT,
        )
