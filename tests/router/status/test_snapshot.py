"""What is shown of a router, as pure values of its core."""

from __future__ import annotations

from dataclasses import replace

import orjson
import pytest

from splitserve.protocol.states import PROBE_ID, FinishReason
from splitserve.protocol.status import Snapshot, WorkerView
from splitserve.router.records import Record
from splitserve.router.stages import GAP_PARTS, TTFT_PARTS
from splitserve.router.status.recent import KEPT, Recent
from splitserve.router.status.snapshot import SHOWN, bar, snapshot
from support.router_bench import Bench, worker_beat
from support.status import ROUTER


def seen(bench: Bench, recent: Recent | None = None) -> Snapshot:
    return snapshot(bench.core, recent or Recent(), ROUTER, bench.now)


def worker(bench: Bench, name: str) -> WorkerView:
    return next(view for view in seen(bench).workers if view.name == name)


def ended(bench: Bench, recent: Recent) -> Record:
    decode, prefill = bench.transferring()
    bench.kv_loaded(decode)
    bench.now += 0.5
    bench.row(decode.slot, decode.da, 1, 5, 6, finish=FinishReason.STOP, first=True)
    for record in bench.records:
        recent.saved(record, bench.now)
    assert prefill.rid == decode.rid
    return bench.records[-1]


def test_workers_stand_by_role_with_what_their_last_beat_said():
    bench = Bench(prefills=1, decodes=2)
    bench.receive(
        worker_beat(
            "d1",
            "decode",
            running=3,
            waiting=2,
            queued_tokens=40,
            free_blocks=250,
            promised_blocks=900,
            step_age_ms=1500,
        )
    )
    assert [view.name for view in seen(bench).workers] == ["p0", "d0", "d1"]
    d1 = worker(bench, "d1")
    assert (d1.running, d1.waiting, d1.queued_tokens, d1.kv_blocks) == (3, 2, 40, 1000)
    assert (d1.kv_used, d1.kv_promised, d1.step_age_s) == (0.75, 0.9, 1.5)


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, "serving"),
        ({"ready": False}, "starting"),
        ({"draining": True}, "draining"),
        ({"step_age_ms": 11_000}, "stuck"),
    ],
)
def test_a_worker_has_one_word(changes: dict[str, int], state: str):
    bench = Bench()
    bench.receive(worker_beat("d0", "decode", **changes))
    assert worker(bench, "d0").state == state


def test_a_silent_worker_is_lost_and_says_for_how_long():
    bench = Bench()
    bench.run(1.0)
    bench.mute.add("d0")
    bench.run(10.0)
    d0 = worker(bench, "d0")
    assert (d0.state, d0.silent_s, d0.since_s) == ("lost", 10.0, 11.0)
    assert worker(bench, "d1").state == "serving"


def test_a_live_request_shows_where_it_is_and_joins_its_two_workers():
    bench = Bench()
    decode, _ = bench.transferring()
    view = seen(bench)
    assert view.load.states == {"queued": 0, "prefilling": 0, "transferring": 1, "decoding": 0}
    assert [(link.prefill, link.decode, link.requests, link.moving) for link in view.links] == [("p0", "d0", 1, 1)]
    assert (worker(bench, "p0").requests + worker(bench, "d0").requests) >= 1
    bench.kv_loaded(decode)
    bench.now += 2.0
    [live] = seen(bench).live
    assert (live.id, live.state, live.prefill, live.decode) == ("a", "decoding", "p0", "d0")
    assert (live.prompt_tokens, live.completion_tokens, live.ended_s) == (10, 1, None)
    assert live.seconds == pytest.approx(2.0)
    assert seen(bench).links[0].moving == 0


def test_the_bar_of_a_request_sums_to_its_time_and_nothing_is_negative():
    bench, recent = Bench(), Recent()
    record = ended(bench, recent)
    [view] = seen(bench, recent).recent
    names = [name for name, _ in view.bar]
    assert {*TTFT_PARTS, *GAP_PARTS} <= set(names), "each stage that is measured is shown"
    assert names.index("place") < names.index("prefill") < names.index("handle")
    assert names.index("handle") < names.index("transfer") < names.index("decode_queue") < names.index("decode")
    assert all(seconds >= 0 for _, seconds in view.bar)
    assert view.seconds == pytest.approx(record.stages["e2e"], abs=1e-6)
    assert bar({"place": 0.25, "e2e": 1.0}) == (("place", 0.25), ("waiting", 0.75))
    assert bar({"place": 0.25, "ttft": 0.5, "other": 0.25, "e2e": 1.0})[-1] == ("decode", 0.5)


def test_ended_requests_are_kept_newest_first_and_only_so_many():
    bench, recent = Bench(), Recent()
    record = ended(bench, recent)
    bench.now += 3.0
    [view] = seen(bench, recent).recent
    assert (view.state, view.completion_tokens, view.ended_s, view.error) == ("finished", 3, 3.0, "")
    assert seen(bench, recent).load.outcomes == {"finished": 1, "cancelled": 0, "failed": 0}
    for n in range(3 * KEPT):
        recent.saved(replace(record, rid=f"r{n}"), bench.now)
    kept = seen(bench, recent).recent
    assert (len(kept), kept[0].id) == (KEPT, f"r{3 * KEPT - 1}")


def test_a_failed_request_shows_its_wire_code_and_a_cancelled_one_none():
    bench, recent = Bench(), Recent()
    bench.reserved(timeout_s=5.0)
    bench.run(6.0)
    bench.submit("b")
    bench.leave("b")
    for record in bench.records:
        recent.saved(record, bench.now)
    found = {view.id: (view.state, view.error) for view in seen(bench, recent).recent}
    assert found["a"] == ("failed", "deadline_exceeded")
    assert found["b"] == ("cancelled", "")


def test_of_many_live_requests_the_oldest_are_shown_and_all_are_counted():
    bench = Bench(split="never")
    for n in range(SHOWN + 5):
        bench.submit(f"r{n}")
        bench.now += 0.01
    view = seen(bench)
    assert (view.live_total, len(view.live), view.live[0].id) == (SHOWN + 5, SHOWN, "r0")


def test_readiness_probes_are_nobodys_requests():
    bench, recent = Bench(), Recent()
    bench.submit(f"{PROBE_ID}1")
    assert (seen(bench).live_total, seen(bench).load.states["queued"]) == (0, 0)
    bench.leave(f"{PROBE_ID}1")
    for record in bench.records:
        recent.saved(record, bench.now)
    assert not seen(bench, recent).recent


def test_a_snapshot_is_json_as_it_is():
    bench, recent = Bench(), Recent()
    ended(bench, recent)
    bench.submit("b")
    shown = orjson.loads(orjson.dumps(seen(bench, recent)))
    assert set(shown) == {"version", "router", "load", "workers", "links", "live", "live_total", "recent"}
