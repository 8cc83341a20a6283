"""What is shown of a request that is remembered."""

from __future__ import annotations

import pytest

from splitserve.protocol.states import RequestState
from splitserve.router.records import Record, live, lost, shown


def fields(state: RequestState) -> dict[str, str]:
    record = Record("a", "router-0-1", 3, state, "m", 1, 1, "p0", "d0", 10, 4, 1_700_000_000.0, 60.0)
    return {**record.row().fields, "owner": record.owner}


@pytest.mark.parametrize("state", list(RequestState))
def test_a_request_is_live_until_its_end(state: RequestState) -> None:
    assert live(fields(state)) == (state not in {RequestState.FINISHED, RequestState.CANCELLED, RequestState.FAILED})


def test_a_request_whose_router_is_gone_is_shown_as_failed_and_otherwise_as_it_was() -> None:
    before, after = shown("a", fields(RequestState.DECODING)), shown("a", lost(fields(RequestState.DECODING)))
    assert (after["state"], after["error"]) == ("failed", "request_failed")
    assert {name: value for name, value in after.items() if before[name] != value}.keys() == {"state", "error"}
