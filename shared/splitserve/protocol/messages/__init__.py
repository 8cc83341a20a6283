"""Every message on the bus, once. `MESSAGES` at the end is the table that the codec reads.

All are idempotent; their key is (rid, attempt, kind). Fields marked `U1`, `U2`, `U4`, `U8` or `U4Lists` travel as
little-endian bytes behind the JSON head, not in it (protocol D10); `trace` of what belongs to one request travels as headers.

| module | from -> to |
|---|---|
| `orders` | router -> worker, and the answers |
| `handover` | prefill worker -> router and decode worker; the lease between the two workers |
| `tokens` | decode worker -> router |
| `reports` | every process, of itself |
"""

from __future__ import annotations

from typing import get_args

from splitserve.protocol.messages.handover import (
    KvFailed,
    KvLoaded,
    KvReady,
    PrefillDurations,
    Release,
    ReleaseAnswer,
    Renew,
    RenewAnswer,
)
from splitserve.protocol.messages.orders import (
    Accepted,
    Amend,
    Cancel,
    DecodeJob,
    FinAck,
    Ping,
    Pong,
    PrefillJob,
    Refused,
    Resume,
    ResumeAnswer,
    ResumeRow,
)
from splitserve.protocol.messages.reports import Beat, Digest, DigestRow, MetricsGet, MetricsPage
from splitserve.protocol.messages.tokens import DecodeDurations, FirstRow, Preempted, RowLogprobs, TokenFrame, TokenRow

Message = (
    DecodeJob | PrefillJob | Amend | Cancel | Resume | FinAck | Ping
    | Accepted | Refused | ResumeAnswer | Pong | ReleaseAnswer | RenewAnswer
    | Release | Renew | KvReady | KvLoaded | KvFailed | TokenFrame | Preempted | Digest
    | Beat | MetricsGet | MetricsPage
)  # fmt: skip

MESSAGES: dict[str, type[Message]] = {kind.__name__: kind for kind in get_args(Message)}

__all__ = [
    "MESSAGES",
    "Accepted",
    "Amend",
    "Beat",
    "Cancel",
    "DecodeDurations",
    "DecodeJob",
    "Digest",
    "DigestRow",
    "FinAck",
    "FirstRow",
    "KvFailed",
    "KvLoaded",
    "KvReady",
    "Message",
    "MetricsGet",
    "MetricsPage",
    "Ping",
    "Pong",
    "Preempted",
    "PrefillDurations",
    "PrefillJob",
    "Refused",
    "Release",
    "ReleaseAnswer",
    "Renew",
    "RenewAnswer",
    "Resume",
    "ResumeAnswer",
    "ResumeRow",
    "RowLogprobs",
    "TokenFrame",
    "TokenRow",
]
