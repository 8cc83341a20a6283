"""The W3C trace context of a request: data that commands and messages carry, whether or not anybody records spans.

On the bus it travels as the NATS headers `traceparent` and `tracestate`, in HTTP as the headers of the same names.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_STATE = re.compile(r"[ -~]{1,512}")  # what W3C asks to pass on; a longer one may be dropped
_SAMPLED, _RANDOM = 1, 2  # the flags that W3C defines; others are not passed on


@dataclass(frozen=True, slots=True)
class TraceContext:
    """`traceparent` names a trace and the span that is the parent of what comes next; "" for work of nobody's trace."""

    traceparent: str = ""
    tracestate: str = ""

    @property
    def trace_id(self) -> str:
        return self.traceparent[3:35]

    @property
    def span_id(self) -> str:
        return self.traceparent[36:52]

    @property
    def sampled(self) -> bool:
        return bool(self.traceparent) and bool(int(self.traceparent[53:], 16) & _SAMPLED)

    def told(self) -> dict[str, str]:
        """As it stands in a log line; empty for no trace."""
        return {"trace_id": self.trace_id} if self.traceparent else {}

    def headers(self) -> dict[str, str]:
        """As they stand in a message; empty for no trace."""
        both = {TRACEPARENT: self.traceparent, TRACESTATE: self.tracestate}
        return {name: value for name, value in both.items() if value}


NO_TRACE = TraceContext()


@dataclass(frozen=True, slots=True)
class InHeaders:
    """Mark of a field that travels in the headers of a message, not in its body."""


Trace = Annotated[TraceContext, InHeaders()]


def trace_of(headers: Mapping[str, str] | None) -> TraceContext:
    """The context in these headers; NO_TRACE when there is none, or a malformed one, which W3C says to ignore.

    A version newer than ours is read as far as ours goes, and passed on as ours.
    """
    found = _FORM.fullmatch(headers.get(TRACEPARENT, "").strip()) if headers else None
    if headers is None or found is None:
        return NO_TRACE
    version, trace_id, span_id, flags, more = found.groups()
    if version == "ff" or (version == "00" and more is not None) or not int(trace_id, 16) or not int(span_id, 16):
        return NO_TRACE
    state = headers.get(TRACESTATE, "").strip()
    known = int(flags, 16) & (_SAMPLED | _RANDOM)
    return TraceContext(f"00-{trace_id}-{span_id}-{known:02x}", state if _STATE.fullmatch(state) else "")


def new_trace() -> TraceContext:
    """A trace that nobody records: it ties messages and logs of one request together."""
    return TraceContext(f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00")
