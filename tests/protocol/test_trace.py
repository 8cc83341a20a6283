"""The trace context: read as W3C says, carried by every message of a request."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.protocol.codec import decode, encode, headers_of
from splitserve.protocol.messages import MESSAGES, Cancel, FinAck
from splitserve.protocol.trace import NO_TRACE, InHeaders, TraceContext, new_trace, trace_of

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{PARENT}-01"
CANCEL = Cancel("r", 1, 1, 1, "client", TraceContext(GOOD, "a=1,b=2"))


def test_a_traceparent_is_read_and_passed_on() -> None:
    trace = trace_of({"traceparent": GOOD, "tracestate": "a=1,b=2"})
    assert (trace.trace_id, trace.span_id, trace.sampled) == (TRACE, PARENT, True)
    assert trace.headers() == {"traceparent": GOOD, "tracestate": "a=1,b=2"}
    assert not trace_of({"traceparent": f"00-{TRACE}-{PARENT}-00"}).sampled


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "nonsense",
        GOOD.upper(),
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[1:]}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-1",
        f"00-{TRACE}-{PARENT}-01-more",
        f"01-{TRACE}-{PARENT}-01more",
        f"00-{TRACE}-{PARENT}-0\u0661",
        f"{GOOD}\r\nx: y",
    ],
)
def test_a_malformed_traceparent_is_ignored_and_its_tracestate_with_it(traceparent: str) -> None:
    assert trace_of({"traceparent": traceparent, "tracestate": "a=1"}) == NO_TRACE


def test_a_later_version_is_read_as_far_as_ours_goes_and_passed_on_as_ours() -> None:
    assert trace_of({"traceparent": f"7a-{TRACE}-{PARENT}-ff-what-comes"}).traceparent == f"00-{TRACE}-{PARENT}-03"


@pytest.mark.parametrize("state", ["x" * 513, "a=1\r\nb: 2", "a=\u00e9"])
def test_a_tracestate_that_cannot_be_passed_on_is_dropped_alone(state: str) -> None:
    assert trace_of({"traceparent": GOOD, "tracestate": state}) == TraceContext(GOOD)


@given(st.dictionaries(st.sampled_from(["traceparent", "tracestate"]), st.text(max_size=80)))
def test_no_header_makes_the_reader_raise(headers: dict[str, str]) -> None:
    found = trace_of(headers)
    assert found == NO_TRACE or trace_of(found.headers()) == found


def test_a_new_trace_is_valid_unsampled_and_its_own() -> None:
    one = new_trace()
    assert trace_of(one.headers()) == one
    assert not one.sampled
    assert one != new_trace()


def test_every_message_of_one_request_carries_its_trace_and_no_other_does() -> None:
    carrying = {kind.__name__ for kind in MESSAGES.values() if any(field.name == "trace" for field in fields(kind))}
    assert carrying == {
        *("DecodeJob", "PrefillJob", "Amend", "Cancel", "KvReady", "KvLoaded", "KvFailed", "Release", "Preempted")
    }
    for name in carrying:
        (mark,) = get_type_hints(MESSAGES[name], include_extras=True)["trace"].__metadata__
        assert isinstance(mark, InHeaders)


def test_a_trace_travels_as_headers_and_is_not_in_the_body() -> None:
    data, headers = encode(CANCEL), headers_of(CANCEL)
    assert TRACE.encode() not in data
    assert headers == {"traceparent": GOOD, "tracestate": "a=1,b=2"}
    assert decode(data, headers) == CANCEL
    assert decode(data) == replace(CANCEL, trace=NO_TRACE)
    assert decode(data, {"traceparent": "nonsense"}) == replace(CANCEL, trace=NO_TRACE)


def test_a_message_without_a_trace_has_no_headers() -> None:
    assert headers_of(replace(CANCEL, trace=NO_TRACE)) is None
    assert headers_of(FinAck("r", 1, (1,))) is None
