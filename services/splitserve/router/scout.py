"""From the fleet to placement's candidates: who may be asked for this request, and what they would have cached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from splitserve.config import RoutingSettings
from splitserve.kv.prefix import block_hashes, chain_seed
from splitserve.protocol.states import Role
from splitserve.router.account import Life, Load, Worker
from splitserve.router.fleet import Fleet
from splitserve.router.generation import Submission
from splitserve.router.placement import (
    Candidate,
    Need,
    NotPlaced,
    Placed,
    Split,
    choose_decode,
    choose_prefill,
    no_decode,
    place,
    sooner,
)

PROMISED_ANSWER = 256  # tokens of answer that a decode worker reserves at admission


@dataclass(slots=True)
class Wish:
    """What one request wants of workers, kept over its tries."""

    submission: Submission
    not_before: dict[str, float] = field(default_factory=dict[str, float])  # refused: asked again then
    never: dict[str, str] = field(default_factory=dict[str, str])  # refused for good, and why
    last: str = ""
    moved: bool = False
    local: bool = False  # too many prefill workers were lost under it: decode reads the prompt
    _hashes: dict[tuple[str, int], list[bytes]] = field(default_factory=dict[tuple[str, int], list[bytes]])
    _before: dict[Life, int] = field(default_factory=dict[Life, int])  # blocks that who has yet to read it had already

    def hashes(self, worker: Worker) -> Sequence[bytes]:
        """Block hashes of the prompt under this worker's model and block size."""
        key = (worker.beat.fingerprint, worker.beat.block_tokens)
        if key not in self._hashes:
            seed = chain_seed(worker.beat.fingerprint, cache_salt=self.submission.cache_salt)
            size = worker.beat.block_tokens
            self._hashes[key] = block_hashes(self.submission.ids, size, seed) if size else []
        return self._hashes[key]

    def taken(self, worker: Worker) -> None:
        """This worker will have the prompt's blocks: requests of now on find them, this one only when they are there."""
        self._before.setdefault(worker.life, self.overlap(worker))
        worker.seen.add(self.hashes(worker))

    def read(self, life: Life) -> None:
        """This worker has the prompt's blocks."""
        self._before.pop(life, None)

    def overlap(self, worker: Worker) -> int:
        """Blocks of the prompt, from its first on, that this worker has as far as we know."""
        before = self._before.get(worker.life)
        return worker.seen.overlap(self.hashes(worker)) if before is None else before


class Scout:
    """Reads the fleet, decides nothing: `placement` does."""

    def __init__(self, fleet: Fleet, settings: RoutingSettings) -> None:
        self._fleet = fleet
        self._settings = settings

    def pair(self, wish: Wish, tokens: int, now: float) -> Placed | NotPlaced:
        """A decode worker and how the prompt is read; `tokens` of context, outputs included."""
        model = wish.submission.model
        decodes = self._fleet.serving(Role.DECODE, model)
        if decodes and all(w.beat.name in wish.never for w in decodes):
            return NotPlaced(next(iter(wish.never.values())), for_good=True)
        prefills = self._fleet.serving(Role.PREFILL, model)
        return place(
            self._need(wish, tokens),
            self._candidates(wish, decodes, tokens, now),
            self._candidates(wish, prefills, tokens, now),
        )

    def decode(self, wish: Wish, tokens: int, fingerprint: str, now: float) -> str | NotPlaced:
        """A decode worker for KV that exists or is being made under this fingerprint."""
        workers = self._fleet.serving(Role.DECODE, wish.submission.model)
        matching = [c for c in self._candidates(wish, workers, tokens, now) if c.fingerprint == fingerprint]
        found = choose_decode(self._need(wish, tokens), matching)
        return found.name if found else no_decode(matching)

    def prefill(self, wish: Wish, tokens: int, fingerprint: str, now: float) -> str | None:
        """Another prefill worker for a decode worker of this fingerprint."""
        workers = self._fleet.serving(Role.PREFILL, wish.submission.model)
        found = choose_prefill(
            self._need(wish, tokens),
            [c for c in self._candidates(wish, workers, tokens, now) if c.fingerprint == fingerprint],
        )
        return found.name if found else None

    def sooner(
        self, wish: Wish, tokens: int, here: Worker, before: int, there: Worker, decode: Worker, now: float
    ) -> bool:
        """Whether the prompt, which waits `here` behind so many tokens, is better read `there`; `decode` answers it."""
        if not self._may_ask(wish, there, now):
            return False
        waiting, free, writer = (self._candidate(wish, worker, tokens, now) for worker in (here, there, decode))
        return sooner(self._need(wish, tokens), replace(waiting, queued_tokens=before), free, writer)

    def decode_load(self, wish: Wish, tokens: int, worker: Worker, *, local: bool) -> Load:
        """What a decode worker promises at admission (engine.md §3): prompt shared, each answer up to 256 tokens."""
        size, params = max(1, worker.beat.block_tokens), wish.submission.params
        answer = min(params.max_tokens, PROMISED_ANSWER)
        n = len(wish.submission.seeds)
        blocks = math.ceil(tokens / size) + n * math.ceil(answer / size)
        return Load(
            tokens=self._uncached(wish, tokens, worker) if local else 0, blocks=blocks, context=tokens + n * answer
        )

    def prefill_load(self, wish: Wish, tokens: int, worker: Worker) -> Load:
        size = max(1, worker.beat.block_tokens)
        return Load(self._uncached(wish, tokens, worker), math.ceil(tokens / size), tokens)

    def _uncached(self, wish: Wish, tokens: int, worker: Worker) -> int:
        return tokens - self._cached(wish, tokens, worker)

    @staticmethod
    def _cached(wish: Wish, tokens: int, worker: Worker) -> int:
        """The last token is always computed: at most tokens - 1, in whole blocks."""
        size = max(1, worker.beat.block_tokens)
        return min(wish.overlap(worker), (tokens - 1) // size) * size

    def _need(self, wish: Wish, tokens: int) -> Need:
        split = Split.NEVER if wish.local else Split(wish.submission.split or self._settings.split)
        return Need(tokens, split, moved=wish.moved, last=wish.last)

    def _candidates(self, wish: Wish, workers: Sequence[Worker], tokens: int, now: float) -> list[Candidate]:
        return [self._candidate(wish, w, tokens, now) for w in workers if self._may_ask(wish, w, now)]

    @staticmethod
    def _may_ask(wish: Wish, worker: Worker, now: float) -> bool:
        name = worker.beat.name
        return worker.usable and name not in wish.never and wish.not_before.get(name, 0.0) <= now

    def _candidate(self, wish: Wish, worker: Worker, tokens: int, now: float) -> Candidate:
        beat, load = worker.beat, worker.load
        blocks = self.decode_load(wish, tokens, worker, local=False).blocks
        decode = beat.role == Role.DECODE
        return Candidate(
            name=beat.name,
            fingerprint=beat.fingerprint,
            factors=beat.fingerprint_factors,
            cached_tokens=self._cached(wish, tokens, worker),
            queued_tokens=worker.queued_tokens(now),
            context=load.context,
            idle=worker.idle,
            room=worker.full_until <= now and (not decode or worker.has_room(blocks)),
            placed=worker.placed,
            rate=worker.rate,
            chunk_tokens=beat.chunk_tokens,
            bytes_per_token=beat.bytes_per_token,
            running=beat.running,
        )
