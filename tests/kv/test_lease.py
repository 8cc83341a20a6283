"""The lease table alone: time is a number, senders are callbacks."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.kv.lease import LeaseTable, Pin
from splitserve.protocol.handle import GroupBlocks

BLOCKS = (GroupBlocks(0, (4, 7, 9), (1, 1, 2)),)


def table_with(*handle_ids: str, ttl_s: float = 15.0, now: float = 100.0) -> LeaseTable:
    table = LeaseTable()
    for handle_id in handle_ids:
        table.grant(handle_id, f"key of {handle_id}", f"token of {handle_id}", BLOCKS, ttl_s, now)
    return table


def test_a_lease_ends_when_its_time_is_over_and_not_before() -> None:
    table = table_with("a", ttl_s=15.0, now=100.0)
    assert table.next_expiry() == 115.0
    assert table.expire(114.9) == []
    assert table.expire(115.0) == ["key of a"]
    assert table.expire(115.0) == []
    assert table.next_expiry() is None
    assert (table.expired_total, table.released_total, len(table)) == (1, 0, 0)


def test_renewal_moves_the_expiry_forward_only_and_names_what_is_not_held() -> None:
    table = table_with("a", "b", ttl_s=10.0, now=0.0)
    assert table.renew(["a", "nobody"], now=5.0) == ("nobody",)
    assert table.renew(["a"], now=1.0) == ()  # a late double must not shorten it
    assert table.expire(10.0) == ["key of b"]
    assert table.expire(14.9) == []
    assert table.expire(15.0) == ["key of a"]


def test_an_owner_that_wakes_after_the_expiry_does_not_renew() -> None:
    table = table_with("a", ttl_s=10.0, now=0.0)
    assert table.renew(["a"], now=60.0) == ("a",)
    assert table.expire(60.0) == ["key of a"]


def test_release_needs_the_token_and_frees_once() -> None:
    table = table_with("a")
    assert not table.release("a", "token of b")
    assert table.expire(100.0) == []
    assert table.release("a", "token of a")
    assert not table.release("a", "token of a")
    assert table.next_expiry() == float("-inf")
    assert table.expire(100.0) == ["key of a"]
    assert table.expire(1000.0) == []
    assert (table.released_total, table.expired_total) == (1, 0)


def test_a_cancelled_job_is_ended_without_a_token() -> None:
    table = table_with("a")
    assert table.end("a")
    assert not table.end("a")
    assert table.expire(100.0) == ["key of a"]


def test_a_handle_is_granted_once() -> None:
    table = table_with("a")
    with pytest.raises(ValueError, match="a is held already"):
        table.grant("a", "other", "token", BLOCKS, 1.0, 100.0)


def test_the_end_of_a_pinned_lease_severs_the_sender_and_frees_after_it_let_go() -> None:
    table = table_with("a", ttl_s=10.0, now=0.0)
    severed: list[str] = []
    first = table.pin("a", lambda: severed.append("first"))
    second = table.pin("a", lambda: severed.append("second"))
    assert table.pins == 2
    assert table.expire(10.0) == []
    assert sorted(severed) == ["first", "second"]
    assert table.lookup("a", "token of a") is None, "an ended lease serves nobody new"
    assert table.held_blocks == 3
    table.unpin(first)
    assert table.expire(11.0) == []
    table.unpin(second)
    assert table.expire(11.0) == ["key of a"]
    assert (table.held_blocks, table.pins, len(table)) == (0, 0, 0)


def test_a_sender_that_lets_go_inside_sever_frees_at_once() -> None:
    table = table_with("a")
    pins: list[Pin] = []
    pins.append(table.pin("a", lambda: table.unpin(pins[0])))
    assert table.release("a", "token of a")
    assert table.expire(100.0) == ["key of a"]


def test_unpinning_a_live_lease_frees_nothing() -> None:
    table = table_with("a")
    table.unpin(table.pin("a", lambda: None))
    assert table.expire(100.0) == []
    assert table.lookup("a", "token of a") is not None


def test_only_a_live_lease_can_be_pinned() -> None:
    with pytest.raises(KeyError):
        table_with().pin("a", lambda: None)


def test_a_token_never_shows_in_a_log_line() -> None:
    lease = table_with("a").lookup("a", "token of a")
    assert lease is not None
    assert "token of a" not in repr(lease)


@given(
    st.lists(
        st.tuples(st.sampled_from(["grant", "renew", "release", "end", "pin", "unpin", "wait"]), st.integers(0, 2))
    )
)
def test_whatever_happens_each_key_is_freed_exactly_once_and_never_under_a_pin(steps: list[tuple[str, int]]) -> None:
    table, now, granted = LeaseTable(), 0.0, 0
    pins: dict[str, list[Pin]] = {}
    freed: list[object] = []
    for number, (step, which) in enumerate(steps):
        name = f"h{which}"
        match step:
            case "grant":
                with suppress(ValueError):  # held already
                    table.grant(name, (name, number), "t", BLOCKS, 5.0, now)
                    granted += 1
            case "renew":
                table.renew([name], now)
            case "release":
                table.release(name, "t")
            case "end":
                table.end(name)
            case "pin" if table.lookup(name, "t") is not None:
                pins.setdefault(name, []).append(table.pin(name, lambda: None))
            case "unpin" if pins.get(name):
                table.unpin(pins[name].pop())
            case _:
                now += 2.0
        out = table.expire(now)
        assert all(not pins.get(key[0]) for key in out if isinstance(key, tuple))
        freed += out
    for pin in (pin for row in pins.values() for pin in row):
        table.unpin(pin)
    freed += table.expire(now + 100)
    assert len(freed) == len(set(freed)) == granted
    assert len(table) == 0


def test_a_lease_may_grow_and_have_no_end_by_time_until_it_is_told_one() -> None:
    table = table_with("a", ttl_s=float("inf"), now=100.0)
    assert table.next_expiry() is None
    more = (GroupBlocks(0, (4, 7, 9, 11), (1, 1, 2, 5)),)
    table.extend("a", more, 15.0, 1000.0)
    lease = table.lookup("a", "token of a")
    assert lease is not None
    assert (lease.groups, table.held_blocks, table.next_expiry()) == (more, 4, 1015.0)
    with pytest.raises(KeyError):
        table.extend("b", more, 15.0, 0.0)
