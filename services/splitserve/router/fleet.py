"""All workers as this router sees them: beats, signs of life, and who is lost.

A worker's name is stable, its `incarnation` is one life of it: a beat of a new life proves that the old one is lost.
"""

from __future__ import annotations

from collections.abc import Iterator

from splitserve.protocol.messages import Beat
from splitserve.protocol.states import Role
from splitserve.router.account import Life, Worker
from splitserve.router.rules import Rules

SILENT_S = 0.3  # a worker with work that is silent for so long is pinged
DEAD_S = 2.0
OWN_BEAT_S = 1.0  # not hearing ourselves for so long: it is our bus that is sick
WELL_AFTER_S = 2.0
WEDGED_MS = 10_000  # a step that runs so long is a dead engine
FORGET_S = 900.0


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
            self._workers[beat.name] = self._met(beat, now)
            if worker is None:
                return None
            self._past.add(worker.life)
            return worker.life
        worker.correct(beat)
        if beat.step_age_ms > WEDGED_MS:
            return self._bury(worker)
        self.heard(life, now)
        return None

    def _met(self, beat: Beat, now: float) -> Worker:
        """A life that is new to us. Until it is measured it is as fast as the most used of its like, the former lives included."""
        met, of = Worker(beat, now), (beat.role, beat.fingerprint)
        like = [worker for worker in self if (worker.beat.role, worker.beat.fingerprint) == of]
        if like:
            known = max(like, key=lambda worker: worker.placed)
            met.prefill_rate, met.rate_beside = known.prefill_rate, known.rate_beside
        return met

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
