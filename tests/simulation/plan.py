"""What one run is made of: a cluster, its clients, and what goes wrong. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from simulation.faults import Network, SingleFault
from splitserve.protocol.params import SamplingParams


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
    NOTHING = "nothing"  # a run may also be spared


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
    long: bool = False  # messages pass the codec, and the last look waits past the age of tombstones
    switched_off: tuple[str, ...] = field(default=())  # safety rules

    @property
    def last_deadline(self) -> float:
        return max((c.at + c.timeout_s for c in self.clients), default=0.0)
