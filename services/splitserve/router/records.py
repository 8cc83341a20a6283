"""What is remembered of a request outside this process, and shown by `GET /v1/requests/{id}`: never its content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import orjson

from splitserve.errors import RequestFailed, row_of
from splitserve.protocol.states import RequestState
from splitserve.store.keys import TERMINAL_TTL_S
from splitserve.store.store import StateRow

VERSION = 1
Shown = str | int | float | dict[str, float] | None


@dataclass(frozen=True, slots=True)
class Record:
    """State of one request at one moment; `seq` rises with each. `created` and the stages are seconds."""

    rid: str
    owner: str  # the router's life
    seq: int
    state: RequestState
    model: str
    pa: int
    da: int
    prefill: str
    decode: str
    prompt_len: int
    n_out: int
    created: float  # wall clock, as the submission says
    timeout_s: float
    error: str = ""  # wire code
    client_request_id: str = ""
    trace_id: str = ""  # 32 hex digits
    losses: int = 0
    stages: Mapping[str, float] = field(default_factory=dict[str, float])

    def row(self) -> StateRow:
        """The hash `req:{rid}` (protocol §5)."""
        fields = {
            "v": str(VERSION),
            "state": str(self.state),
            "model": self.model,
            "pa": str(self.pa),
            "da": str(self.da),
            "prefill": self.prefill,
            "decode": self.decode,
            "prompt_len": str(self.prompt_len),
            "n_out": str(self.n_out),
            "error": self.error,
            "created": f"{self.created:.3f}",
            "losses": str(self.losses),
            "client_request_id": self.client_request_id,
            "trace_id": self.trace_id,
            "stages": orjson.dumps({name: round(seconds, 6) for name, seconds in self.stages.items()}).decode(),
        }
        final = self.state.terminal
        ttl = TERMINAL_TTL_S if final else 2 * self.timeout_s
        return StateRow(self.rid, self.owner, self.seq, ttl, final, fields)


def live(fields: Mapping[str, str]) -> bool:
    """Whether stored fields tell of a request that has not ended."""
    return not RequestState(fields["state"]).terminal


def lost(fields: Mapping[str, str]) -> Mapping[str, str]:
    """The fields of a live request whose router is gone, and its client's connection with it: nobody will write its end."""
    return {**fields, "state": str(RequestState.FAILED), "error": row_of(RequestFailed).code}


def shown(rid: str, fields: Mapping[str, str]) -> dict[str, Shown]:
    """The stored fields of a request as its JSON answer."""
    return {
        "id": rid,
        "object": "request",
        "state": fields["state"],
        "model": fields["model"],
        "owner": fields["owner"],
        "attempts_prefill": int(fields["pa"]),
        "attempts_decode": int(fields["da"]),
        "prefill_worker": fields["prefill"] or None,
        "decode_worker": fields["decode"] or None,
        "prompt_tokens": int(fields["prompt_len"]),
        "completion_tokens": int(fields["n_out"]),
        "workers_lost": int(fields["losses"]),
        "error": fields["error"] or None,
        "created": float(fields["created"]),
        "client_request_id": fields["client_request_id"] or None,
        "trace_id": fields.get("trace_id") or None,  # a router of before may have written the record
        "stages_s": orjson.loads(fields["stages"]),
    }
