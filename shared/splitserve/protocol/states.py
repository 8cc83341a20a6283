"""States of a request (router), of a worker's job, and why a sequence or a request ended."""

from __future__ import annotations

from enum import IntEnum, StrEnum

PROBE_ID = "probe-"  # how the ids of readiness probes begin


def is_probe(rid: str) -> bool:
    """Whether this is a readiness probe: nobody's request, so counted nowhere."""
    return rid.startswith(PROBE_ID)


class Role(StrEnum):
    ROUTER = "router"
    PREFILL = "prefill"
    DECODE = "decode"


class RequestState(StrEnum):
    QUEUED = "queued"
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    DECODING = "decoding"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def terminal(self) -> bool:
        return self in (RequestState.FINISHED, RequestState.CANCELLED, RequestState.FAILED)


class PrefillState(StrEnum):
    """queued -> running -> held (under a lease) -> freed."""

    QUEUED = "queued"
    RUNNING = "running"
    HELD = "held"


class DecodeState(StrEnum):
    """reserved -> fetching -> ready -> running -> done (kept until FinAck); failed -> reserved by Amend."""

    RESERVED = "reserved"
    FETCHING = "fetching"
    READY = "ready"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class FinishReason(IntEnum):
    """Why a sequence ended at the worker. Stop strings are the router's: it cancels."""

    RUNNING = 0
    STOP = 1  # an end-of-sequence or stop token; it is the last id of the row
    LENGTH = 2  # max_tokens, or the model's context is full
    ERROR = 3  # the engine failed under it


class FailReason(StrEnum):
    """Why a handle could not be turned into blocks (KvFailed)."""

    FENCED = "fenced"
    UNREACHABLE = "unreachable"
    MISMATCH = "mismatch"
    CHECKSUM = "checksum"


class RefuseReason(StrEnum):
    """Why a worker did not take a job."""

    FULL = "full"
    MISMATCH = "mismatch"
    STALE_INCARNATION = "stale_incarnation"
    STALE_ATTEMPT = "stale_attempt"
    DRAINING = "draining"
    TOO_LONG = "too_long"
    TOO_LARGE = "too_large"  # the message is over the bus's limit: said by the asker's own shell, it was not sent
    UNKNOWN = "unknown"  # Amend or Resume of a request that this worker does not hold
    UNREADABLE = "unreadable"
