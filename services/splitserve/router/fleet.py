"""The workers as this router sees them: beats, signs of life, and its own promises to each.

Own promises count at once; beats only correct them (other routers' load). A worker's name is stable, its
`incarnation` is one life of it: a beat of a new life proves that the old one is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

from splitserve.protocol.messages import Beat
from splitserve.protocol.states import Role
from splitserve.router.prefixes import SeenPrefixes
from splitserve.router.rules import Rules

SILENT_S = 0.3  # a worker with work that is silent for so long is pinged
DEAD_S = 2.0
OWN_BEAT_S = 1.0  # not hearing ourselves for so long: it is our bus that is sick
WELL_AFTER_S = 2.0
WEDGED_MS = 10_000  # a step that runs so long is a dead engine
FORGET_S = 900.0
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
    unread: dict[PromiseKey, int] = field(
        default_factory=dict[PromiseKey, int]
    )  # their prompt tokens, the oldest first
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
        return not self.unread and self.usable and not self.load.tokens

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


class Fleet:
    """Registry and liveness (protocol §3 "Liveness"). Methods that may find a life lost return it."""

    def __init__(self, own: Life, rules: Rules) -> None:
        self._own = own
        self._rules = rules
        self._workers: dict[str, Worker] = {}
        self._past: set[Life] = set()
        self._routers: dict[str, tuple[Life, float]] = {}  # the others, and when they were heard
        self._own_heard_at: float | None = None
        self._well_at = 0.0
        self._bus_down = False

    # --- what is known ---

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def get(self, name: str) -> Worker | None:
        return self._workers.get(name)

    def in_life(self, life: Life) -> Worker | None:
        """The worker, if this is its present life."""
        worker = self._workers.get(life[0])
        return worker if worker is not None and worker.life == life else None

    def serving(self, role: Role, model: str) -> list[Worker]:
        """Alive workers of a role that serve `model`, by name; suspects included (they may come back)."""
        found = [w for w in self if w.alive and w.beat.role == role and w.beat.model == model and not w.beat.draining]
        return sorted(found, key=lambda w: w.beat.name)

    def lives(self, now: float) -> list[Life]:
        """Every other process that lives: workers, and routers that were heard of late (or may have been, unheard by us)."""
        for name, (_, heard_at) in list(self._routers.items()):
            if now - heard_at > DEAD_S and not self.sick(now):
                del self._routers[name]
        return [w.life for w in self if w.alive] + [life for life, _ in self._routers.values()]

    # --- signs of life ---

    def on_beat(self, beat: Beat, now: float) -> Life | None:
        """Take a beat. Returns the life that this beat proves lost."""
        if beat.role == Role.ROUTER:
            if (beat.name, beat.incarnation) == self._own:
                self._hear_own(now)
            else:
                self._routers[beat.name] = ((beat.name, beat.incarnation), now)
            return None
        life = (beat.name, beat.incarnation)
        if life in self._past:
            return None  # of a former life, late
        worker = self._workers.get(beat.name)
        if worker is None or worker.life != life:
            self._workers[beat.name] = Worker(beat, now)
            if worker is None:
                return None
            self._past.add(worker.life)
            return worker.life
        worker.correct(beat)
        if beat.step_age_ms > WEDGED_MS:
            return self._bury(worker)
        self.heard(life, now)
        return None

    def heard(self, life: Life, now: float) -> None:
        """Anything from this life proves it, but for a wedged engine, whose other threads may talk on."""
        worker = self.in_life(life)
        if worker is not None and worker.beat.step_age_ms <= WEDGED_MS:
            worker.heard_at = max(worker.heard_at, now)
            worker.alive, worker.suspect = True, False

    def pinged(self, life: Life, *, answered: bool, gone: bool, now: float) -> Life | None:
        """The end of a ping. Returns the life if it is thereby lost."""
        worker = self.in_life(life)
        if worker is None:
            return None
        worker.pinging = False
        if answered:
            self.heard(life, now)
        elif gone:
            return self.no_responders(life, now)
        elif not self.sick(now):
            worker.suspect = True
        return None

    def no_responders(self, life: Life, now: float) -> Life | None:
        """The bus knows of no such process: dead now, unless it is our bus that is sick (they reconnect too)."""
        worker = self.in_life(life)
        return None if worker is None or self.sick(now) else self._bury(worker)

    # --- judgement ---

    def sick(self, now: float) -> bool:
        """Our own bus is not to be trusted: no one is declared dead."""
        if not self._rules.own_beat_rule:
            return False
        if self._own_heard_at is None:
            self._own_heard_at = now
        return self._bus_down or now < self._well_at or now - self._own_heard_at > OWN_BEAT_S

    def on_bus(self, *, down: bool) -> None:
        """Our connection was lost or is back: trusted again some time after we hear ourselves."""
        self._bus_down = down
        self._own_heard_at = float("-inf")

    def judge(self, now: float) -> tuple[list[Worker], list[Life]]:
        """Workers to ping now, and lives lost by silence."""
        if self.sick(now):
            return [], []
        ping: list[Worker] = []
        lost: list[Life] = []
        for worker in list(self):
            silence = now - worker.heard_at
            if not worker.alive:
                if silence > FORGET_S:
                    del self._workers[worker.beat.name]
            elif silence >= DEAD_S:
                lost.append(worker.life)
                self._bury(worker)
            elif worker.promises and not worker.pinging and now >= _ping_at(worker):
                worker.pinging = True
                ping.append(worker)
        return ping, lost

    def wake_at(self, now: float) -> float | None:
        """When `judge` has something to look at again."""
        if self.sick(now):
            return self._well_at if self._well_at > now else None
        return min(
            (_ping_at(w) if w.promises and not w.pinging else w.heard_at + DEAD_S for w in self if w.alive),
            default=None,
        )

    def _hear_own(self, now: float) -> None:
        if self._own_heard_at is not None and now - self._own_heard_at > OWN_BEAT_S:
            self._well_at = now + WELL_AFTER_S
        self._own_heard_at = now

    def _bury(self, worker: Worker) -> Life | None:
        was, worker.alive, worker.pinging = worker.alive, False, False
        return worker.life if was else None


def _ping_at(worker: Worker) -> float:
    return max(worker.heard_at, worker.busy_since) + SILENT_S
