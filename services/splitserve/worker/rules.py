"""What both workers' cores may be told: the protocol's numbers, and each safety rule behind a switch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Numbers of the protocol. Seconds unless the name says otherwise."""

    lease_ttl_s: float = 15.0
    queued_tokens: int = 65_536  # prompt tokens that may wait at a prefill worker
    pool_share: float = 0.95  # of a decode worker's pool that may be promised
    promise_tokens: int = 256  # of an answer that a reservation covers
    retry_ms: int = 150
    tombstone_s: float = 60.0
    tombstones: int = 10_000
    done_kept_s: float = 30.0  # a finished sequence waits for its FinAck
    router_silence_s: float = 5.0
    router_forgotten_s: float = 600.0
    own_beat_s: float = 1.0  # own beat not heard for so long: our bus is sick
    bus_settle_s: float = 2.0  # nobody is judged until so long after it is back
    digest_s: float = 1.0
    renew_s: float = 3.0
    release_timeout_s: float = 0.3
    release_tries: int = 3
    frame_tokens: int = 1024  # of one frame; a longer resume is cut: with 20 logprobs a token that is 600 KB


@dataclass(frozen=True, slots=True)
class Rules:
    """Safety rules, all on. Only the simulator switches one off, to prove that it then finds a broken run.

    What other rules heal anyway, at the price of time, has no switch: leases, the clock before the mail, the own beat.

    | rule | what it keeps |
    |---|---|
    | tombstones | an attempt that ended never runs again, however late its double comes |
    | same_number_same_answer | a job asked for twice under one number runs once |
    | stale_incarnation | what was meant for an earlier life of this worker is refused |
    | guard_pa_awaited | only KV of the attempt that was awaited is taken |
    | hold_while_computing | blocks that are read early stay under their lease until their prompt is done |
    | validate_before_index | fetched blocks are used only when the reader found them whole |
    | free_after_copy | blocks that are being written by a fetch are freed when it has ended |
    | keep_until_finack | a finished sequence can be asked for again until the router has it |
    | promise | a job is taken only if its blocks fit beside all promised ones |
    """

    tombstones: bool = True
    same_number_same_answer: bool = True
    stale_incarnation: bool = True
    guard_pa_awaited: bool = True
    hold_while_computing: bool = True
    validate_before_index: bool = True
    free_after_copy: bool = True
    keep_until_finack: bool = True
    promise: bool = True
