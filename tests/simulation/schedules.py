"""What a seed means: a cluster, its clients, and what goes wrong, drawn by `random.Random(seed)` and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from simulation.faults import MessageFault, Network, SingleFault
from simulation.plan import ClientPlan, Cluster, Event, Fate, Schedule
from splitserve.protocol.params import SamplingParams

PROMPT_IDS = 1000  # ids that prompts are made of
LONGEST_STEM = 40  # tokens that prompts may share


def _between(rng: Random, least: float, most: float) -> float:
    return least + (most - least) * rng.random()


def _clients(rng: Random, kind: Profile) -> tuple[ClientPlan, ...]:
    stems = [tuple(rng.randrange(PROMPT_IDS) for _ in range(LONGEST_STEM)) for _ in range(2)]
    return tuple(_client(rng, stems, kind) for _ in range(rng.randint(1, kind.clients)))


def _client(rng: Random, stems: list[tuple[int, ...]], kind: Profile) -> ClientPlan:
    shared = rng.choice(stems)[: rng.randrange(LONGEST_STEM)]
    ids = shared + tuple(rng.randrange(PROMPT_IDS) for _ in range(rng.randint(1, 8)))
    n = rng.choice(kind.answers)
    params = SamplingParams(
        max_tokens=rng.choice(kind.max_tokens),
        temperature=rng.choice((0.0, 1.0)),
        ignore_eos=rng.random() < 0.5,
        logprobs=rng.choice((None, None, 0)),
    )
    at = _between(rng, 0.6, 2.1)
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


_ROUTER_TOO = (Fate.FREEZE, Fate.PARTITION, Fate.CUT, Fate.KILL)


def _seconds(rng: Random, fate: Fate) -> float:
    if fate is Fate.WEDGE:
        return rng.choice((3.0, 14.0, 45.0))
    if fate is Fate.KILL:
        return rng.choice((0.05, 0.5, 3.0, 8.0))
    return rng.choice((0.1, 0.5, 1.2, 2.5, 4.0, 8.0, 13.0, 20.0)) * _between(rng, 0.8, 1.2)


LOSSY = Network(drop=0.04, double=0.04, delay=0.04)
BAD = Network(latency=(0.0002, 0.2), drop=0.08, double=0.08, delay=0.08)
RACY = Network(latency=(0.0002, 0.05), drop=0.05, double=0.05, delay=0.08, late=(0.05, 2.0))
# A row of tokens is often the first word of its worker.
UNHEARD = Network(drop=0.6, only=frozenset({"Accepted", "KvReady", "KvLoaded"}))
SLOW = Cluster(step_s=(0.01, 0.08), copy_s=(0.001, 0.05))
CRAWL = Cluster(
    chunk_tokens=4, decode_chunk_tokens=4, step_s=(0.05, 0.2), copy_s=(0.01, 0.2), lease_ttl_s=4.0, queue_timeout_s=5.0
)
LONG = Cluster(  # two long answers outgrow what was promised to them
    prefill=1, decode=1, decode_blocks=110, prefill_blocks=220, block_tokens=8, chunk_tokens=64, decode_chunk_tokens=32,
    step_s=(0.001, 0.002),
)  # fmt: skip
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
    max_tokens: tuple[int, ...] = (1, 2, 3, 5, 8, 13, 30)
    answers: tuple[int, ...] = (1, 1, 1, 2, 3)  # to one prompt


PROFILES: dict[str, Profile] = {
    "calm": Profile((Cluster(),)),
    "lossy": Profile((Cluster(), SLOW), (LOSSY, UNHEARD)),
    "deaths": Profile((Cluster(), SLOW), fates=(Fate.KILL, Fate.KILL, Fate.RAISE, Fate.LEAVE)),
    "freezes": Profile((Cluster(), SLOW), fates=(Fate.FREEZE, Fate.FREEZE, Fate.WEDGE)),
    "outages": Profile((Cluster(), SLOW), fates=(Fate.BUS_RESTART, Fate.PARTITION, Fate.CUT)),
    "few": Profile((Cluster(), SLOW, CRAWL, TINY), fates=(*MISFORTUNES, Fate.NOTHING), misfortunes=1, singles=4),
    "crawl": Profile(
        (CRAWL, CRAWL, replace(CRAWL, decode=1)),
        (Network(), LOSSY),
        (Fate.FREEZE, Fate.KILL, Fate.PARTITION, Fate.WEDGE),
        misfortunes=2,
    ),
    "poison": Profile(
        (Cluster(), SLOW, replace(SLOW, prefill=5)), clients=3, poison=("", "decode", "prefill", "prefill-0")
    ),
    "long": Profile(
        (LONG,),
        (Network(), Network(drop=0.01, double=0.01)),
        clients=3,
        max_tokens=(3, 440, 440, 440),
        answers=(1, 1, 2),
    ),
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
RARE = 64  # one seed in so many has long answers, and one in so many waits for tombstones: they cost ten others


def _single(rng: Random) -> SingleFault:
    return SingleFault(int(250 * rng.random() ** 2) + 1, rng.choice(tuple(MessageFault)), 4.0 * rng.random() ** 2)


def schedule_of(seed: int, profile: str | None = None) -> Schedule:
    """The schedule of a seed; the profile too is the seed's unless named."""
    rng = Random(f"schedule {seed}")
    name = profile or ("long" if seed % RARE == RARE - 1 else WEIGHTS[seed % len(WEIGHTS)])
    kind = PROFILES[name]
    cluster = rng.choice(kind.clusters)
    cluster = replace(
        cluster,
        free_variant=rng.random() < 0.5,
        split=rng.choice(("always", "always", "auto", "never")) if cluster.prefill else "auto",
        transport=rng.choice(("shm", "shm", "tcp")),
    )
    clients = tuple(replace(plan, poison=rng.choice(kind.poison)) for plan in _clients(rng, kind))
    faults = [_single(rng) for _ in range(rng.randint(1, kind.singles))] if kind.singles else []
    return Schedule(
        seed=seed,
        profile=name,
        cluster=cluster,
        network=rng.choice(kind.networks),
        clients=clients,
        events=_events(rng, cluster, clients, kind) if kind.fates else (),
        singles=tuple(faults),
        long=rng.random() < 1 / RARE,
    )
