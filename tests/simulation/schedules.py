"""What a seed means: a cluster, its clients, and what goes wrong, drawn by `random.Random(seed)` and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from random import Random

from simulation.faults import MessageFault, Network, SingleFault
from splitserve.protocol.params import SamplingParams

PROMPT_IDS = 1000  # ids that prompts are made of


@dataclass(frozen=True, slots=True)
class Cluster:
    """Size and speed. Times in seconds, (least, most)."""

    prefill: int = 2
    decode: int = 2
    prefill_blocks: int = 64
    decode_blocks: int = 64
    block_tokens: int = 4
    chunk_tokens: int = 16
    decode_chunk_tokens: int = 8
    max_num_seqs: int = 16
    lease_ttl_s: float = 15.0
    queue_timeout_s: float = 30.0
    split: str = "always"
    transport: str = "shm"
    step_s: tuple[float, float] = (0.002, 0.01)
    copy_s: tuple[float, float] = (0.0001, 0.001)  # one block
    free_variant: bool = False  # "bf16": each sampling of one token may differ


@dataclass(frozen=True, slots=True)
class ClientPlan:
    """One request, and what its client does on the way. `leaves_at` and `at` are instants; a stop is (choice, index)."""

    at: float
    ids: tuple[int, ...]
    params: SamplingParams
    seeds: tuple[int, ...]
    timeout_s: float = 20.0
    leaves_at: float | None = None
    stop: tuple[int, int] | None = None
    poison: str = ""  # workers whose names begin so die when they take it


class Fate(StrEnum):
    KILL = "kill"  # SIGKILL; the supervisor starts another life `seconds` later
    FREEZE = "freeze"  # SIGSTOP, and SIGCONT `seconds` later
    PARTITION = "partition"  # its lines go dead; noticed after some seconds
    CUT = "cut"  # its lines break, and it knows
    BUS_RESTART = "bus restart"  # everybody's
    WEDGE = "wedge"  # the engine's step hangs for `seconds`
    RAISE = "raise"  # the engine's next step raises
    LEAVE = "leave"  # told to drain
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Event:
    at: float
    fate: Fate
    target: str = ""  # a process; "" where it is everybody
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """All that happens in one run, besides what the cluster does by itself."""

    seed: int
    profile: str
    cluster: Cluster
    network: Network
    clients: tuple[ClientPlan, ...]
    events: tuple[Event, ...] = ()
    singles: tuple[SingleFault, ...] = ()  # beside those of `network`
    long: bool = False  # wait past the age of tombstones before the last look
    switched_off: tuple[str, ...] = field(default=())  # safety rules

    @property
    def last_deadline(self) -> float:
        return max((c.at + c.timeout_s for c in self.clients), default=0.0)


def _between(rng: Random, least: float, most: float) -> float:
    return least + (most - least) * rng.random()


def _clients(rng: Random, most: int, span: float = 1.5, longest: int = 40) -> tuple[ClientPlan, ...]:
    stems = [tuple(rng.randrange(PROMPT_IDS) for _ in range(longest)) for _ in range(2)]
    return tuple(_client(rng, stems, span, longest) for _ in range(rng.randint(1, most)))


def _client(rng: Random, stems: list[tuple[int, ...]], span: float, longest: int) -> ClientPlan:
    shared = rng.choice(stems)[: rng.randrange(longest)]
    ids = shared + tuple(rng.randrange(PROMPT_IDS) for _ in range(rng.randint(1, 8)))
    n = rng.choice((1, 1, 1, 2, 3))
    params = SamplingParams(
        max_tokens=rng.choice((1, 2, 3, 5, 8, 13, 30)),
        temperature=rng.choice((0.0, 1.0)),
        ignore_eos=rng.random() < 0.5,
    )
    at = _between(rng, 0.6, 0.6 + span)
    leaves = at + _between(rng, 0.0, 0.4) ** 2 * 4 if rng.random() < 0.15 else None
    stop = (rng.randrange(n), rng.randrange(params.max_tokens)) if rng.random() < 0.15 else None
    return ClientPlan(
        at=at,
        ids=ids,
        params=params,
        seeds=tuple(rng.getrandbits(32) for _ in range(n)),
        timeout_s=rng.choice((6.0, 20.0, 20.0, 20.0)),
        leaves_at=leaves,
        stop=stop,
    )


def _workers(cluster: Cluster) -> list[str]:
    return [f"prefill-{i}" for i in range(cluster.prefill)] + [f"decode-{i}" for i in range(cluster.decode)]


def _events(rng: Random, cluster: Cluster, clients: tuple[ClientPlan, ...], profile: Profile) -> tuple[Event, ...]:
    """Misfortunes while there is work: soon after a client came."""
    found: list[Event] = []
    workers = _workers(cluster)
    for _ in range(rng.randint(1, profile.misfortunes)):
        fate = rng.choice(profile.fates)
        target = rng.choice([*workers, "router"] if fate in _ROUTER_TOO else workers)
        at = rng.choice(clients).at + rng.random() ** 3
        found.append(Event(at, fate, target, _seconds(rng, fate)))
    return tuple(sorted(found, key=lambda event: event.at))


_ROUTER_TOO = (Fate.FREEZE, Fate.PARTITION, Fate.CUT)


def _seconds(rng: Random, fate: Fate) -> float:
    if fate is Fate.WEDGE:
        return rng.choice((3.0, 14.0, 45.0))
    if fate is Fate.KILL:
        return rng.choice((0.05, 0.5, 3.0, 8.0))
    return rng.choice((0.1, 0.5, 1.2, 2.5, 4.0, 8.0, 13.0, 20.0)) * _between(rng, 0.8, 1.2)


LOSSY = Network(drop=0.04, double=0.04, delay=0.04)
BAD = Network(latency=(0.0002, 0.2), drop=0.08, double=0.08, delay=0.08)
RACY = Network(latency=(0.0002, 0.05), drop=0.05, double=0.05, delay=0.08, late=(0.05, 2.0))
SLOW = Cluster(step_s=(0.01, 0.08), copy_s=(0.001, 0.05))
CRAWL = Cluster(
    chunk_tokens=4, decode_chunk_tokens=4, step_s=(0.05, 0.2), copy_s=(0.01, 0.2), lease_ttl_s=4.0, queue_timeout_s=5.0
)
TINY = Cluster(prefill_blocks=16, decode_blocks=18, max_num_seqs=4)
RACE = Cluster(prefill_blocks=16, decode_blocks=24, lease_ttl_s=0.3, copy_s=(0.02, 0.15), step_s=(0.005, 0.05))
MISFORTUNES = (Fate.KILL, Fate.KILL, Fate.FREEZE, Fate.FREEZE, Fate.PARTITION, Fate.CUT, Fate.BUS_RESTART, Fate.WEDGE,
               Fate.RAISE, Fate.LEAVE)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Profile:
    """A kind of run: clusters, networks and fates to draw from."""

    clusters: tuple[Cluster, ...]
    networks: tuple[Network, ...] = (Network(),)
    fates: tuple[Fate, ...] = ()
    misfortunes: int = 3  # at most
    clients: int = 4  # at most
    singles: int = 0  # at most: faults at random messages of a good network
    poison: tuple[str, ...] = ("",)


PROFILES: dict[str, Profile] = {
    "calm": Profile((Cluster(),)),
    "lossy": Profile((Cluster(), SLOW), (LOSSY,)),
    "deaths": Profile((Cluster(), SLOW), fates=(Fate.KILL, Fate.KILL, Fate.RAISE, Fate.LEAVE)),
    "freezes": Profile((Cluster(), SLOW), fates=(Fate.FREEZE, Fate.FREEZE, Fate.WEDGE)),
    "outages": Profile((Cluster(), SLOW), fates=(Fate.BUS_RESTART, Fate.PARTITION, Fate.CUT)),
    "few": Profile((Cluster(), SLOW, CRAWL, TINY), fates=(*MISFORTUNES, Fate.NOTHING), misfortunes=1, singles=4),
    "crawl": Profile((CRAWL,), (Network(), LOSSY), (Fate.FREEZE, Fate.KILL, Fate.PARTITION, Fate.WEDGE), misfortunes=2),
    "poison": Profile((Cluster(), SLOW), clients=3, poison=("", "decode", "prefill", "prefill-0")),
    "tiny": Profile((TINY,), (replace(LOSSY, drop=0.02),), MISFORTUNES, misfortunes=1, clients=8),
    "race": Profile((RACE,), (RACY,), (Fate.FREEZE, Fate.KILL, Fate.PARTITION), misfortunes=2, clients=8),
    "mixed": Profile(
        (Cluster(), SLOW, TINY, RACE, replace(SLOW, decode=1), replace(SLOW, prefill=1), Cluster(prefill=0)),
        (Network(), LOSSY, BAD),
        MISFORTUNES,
        misfortunes=5,
        clients=6,
    ),
}
WEIGHTS = (
    "calm", "lossy", "deaths", "freezes", "outages", "tiny", "tiny", "race", "race", "mixed", "mixed", "few", "few",
    "crawl", "crawl", "poison",
)  # fmt: skip


def _single(rng: Random) -> SingleFault:
    return SingleFault(int(250 * rng.random() ** 2) + 1, rng.choice(tuple(MessageFault)), 4.0 * rng.random() ** 2)


def schedule_of(seed: int, profile: str | None = None) -> Schedule:
    """The schedule of a seed; the profile too is the seed's unless named."""
    rng = Random(f"schedule {seed}")
    name = profile or WEIGHTS[seed % len(WEIGHTS)]
    kind = PROFILES[name]
    cluster = rng.choice(kind.clusters)
    cluster = replace(
        cluster,
        free_variant=rng.random() < 0.5,
        split=rng.choice(("always", "always", "auto", "never")) if cluster.prefill else "auto",
        transport=rng.choice(("shm", "shm", "tcp")),
    )
    clients = tuple(replace(plan, poison=rng.choice(kind.poison)) for plan in _clients(rng, kind.clients))
    faults = [_single(rng) for _ in range(rng.randint(1, kind.singles))] if kind.singles else []
    return Schedule(
        seed=seed,
        profile=name,
        cluster=cluster,
        network=rng.choice(kind.networks),
        clients=clients,
        events=_events(rng, cluster, clients, kind) if kind.fates else (),
        singles=tuple(faults),
        long=rng.random() < 1 / 16,
    )
