"""What the status page and `splitserve top` show, as plain values of one moment: never a prompt, an answer or a user.

Everything is made from the router's core and `Recent` when somebody looks. Durations are seconds, shares are 0 to 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from splitserve.protocol.states import RequestState, is_probe
from splitserve.protocol.status import VERSION, LinkView, LoadView, RequestView, RouterView, Snapshot, WorkerView
from splitserve.router.account import Worker
from splitserve.router.core import RouterCore
from splitserve.router.fleet import WEDGED_MS
from splitserve.router.records import Record
from splitserve.router.request import Request
from splitserve.router.stages import TTFT_PARTS
from splitserve.router.status.recent import Recent

SHOWN = 40  # live requests, the oldest first
RATE_S = 10
BAR = (
    "tokenise",
    *TTFT_PARTS,
    "other",
    "handle",
    "transfer",
    "decode_queue",
    "first_step",
    "gap_other",
)  # a request's time in the order in which it passes


def snapshot(core: RouterCore, recent: Recent, router: RouterView, now: float) -> Snapshot:
    """The whole as of `now`, a time of the core's clock."""
    requests = [life.request for rid, life in core.lives().items() if not is_probe(rid)]
    oldest = [(request, request.stages.seconds(now)) for request in requests]
    oldest.sort(key=lambda pair: -pair[1]["e2e"])
    return Snapshot(
        version=VERSION,
        router=router,
        load=_load(core, recent, requests, now),
        workers=_workers(core, requests, now),
        links=_links(requests),
        live=tuple(_live(request, stages) for request, stages in oldest[:SHOWN]),
        live_total=len(requests),
        recent=tuple(_ended(record, now - at) for record, at in reversed(recent.ended)),
    )


def bar(stages: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """A request's seconds, part by part. What is left over is `decode` once a first token is out, before that `waiting`."""
    parts = [(name, max(0.0, stages[name])) for name in BAR if name in stages]
    rest = stages["e2e"] - sum(seconds for _, seconds in parts)
    parts.append(("decode" if "ttft" in stages else "waiting", max(0.0, rest)))
    return tuple((name, round(seconds, 6)) for name, seconds in parts)


def _load(core: RouterCore, recent: Recent, requests: Iterable[Request], now: float) -> LoadView:
    states = Counter(request.state for request in requests)
    outcomes = recent.outcomes.counts(now)
    return LoadView(
        states={str(state): states[state] for state in RequestState if not state.terminal},
        waiting=core.waiting.requests,
        waiting_tokens=core.waiting.tokens,
        tokens_per_s=recent.tokens.counts(now, RATE_S).total() / RATE_S,
        ttft_s=recent.ttft.median(now),
        inter_token_s=recent.gaps.median(now),
        outcomes={str(state): outcomes[state] for state in RequestState if state.terminal},
    )


def _workers(core: RouterCore, requests: Iterable[Request], now: float) -> tuple[WorkerView, ...]:
    here = Counter(leg.life for r in requests for leg in (r.prefill, r.decode) if leg is not None)
    views = [_worker(worker, here[worker.life], now) for worker in core.fleet]
    return tuple(sorted(views, key=lambda view: (view.role != "prefill", view.name)))


def _worker(worker: Worker, requests: int, now: float) -> WorkerView:
    beat = worker.beat
    blocks = max(1, beat.total_blocks)
    return WorkerView(
        name=beat.name,
        role=beat.role,
        state=worker_state(worker),
        running=beat.running,
        waiting=beat.waiting,
        queued_tokens=beat.queued_tokens,
        requests=requests,
        kv_blocks=beat.total_blocks,
        kv_used=round((beat.total_blocks - beat.free_blocks) / blocks, 4),
        kv_promised=round(min(1.0, beat.promised_blocks / blocks), 4),
        step_age_s=beat.step_age_ms / 1000,
        silent_s=round(now - worker.heard_at, 1),
        since_s=round(now - worker.met_at, 1),
    )


def worker_state(worker: Worker) -> str:
    """One word, the worst that is true."""
    beat = worker.beat
    words = (
        (not worker.alive and beat.step_age_ms > WEDGED_MS, "stuck"),
        (not worker.alive, "lost"),
        (worker.suspect, "suspect"),
        (beat.draining, "draining"),
        (not beat.ready, "starting"),
    )
    return next((word for is_so, word in words if is_so), "serving")


def _links(requests: Iterable[Request]) -> tuple[LinkView, ...]:
    pairs: Counter[tuple[str, str]] = Counter()
    moving: Counter[tuple[str, str]] = Counter()
    for request in requests:
        if request.prefill_name and request.decode_name:
            pair = (request.prefill_name, request.decode_name)
            pairs[pair] += 1
            moving[pair] += request.state is RequestState.TRANSFERRING
    return tuple(LinkView(*pair, requests=pairs[pair], moving=moving[pair]) for pair in sorted(pairs))


def _live(request: Request, stages: Mapping[str, float]) -> RequestView:
    return RequestView(
        id=request.rid,
        state=request.state,
        prefill=request.prefill_name,
        decode=request.decode_name,
        attempts_prefill=request.pa,
        attempts_decode=request.da,
        workers_lost=request.losses,
        prompt_tokens=len(request.submission.ids),
        completion_tokens=len(request.transcript),
        error="",
        seconds=round(stages["e2e"], 6),
        ended_s=None,
        bar=bar(stages),
    )


def _ended(record: Record, ago: float) -> RequestView:
    return RequestView(
        id=record.rid,
        state=record.state,
        prefill=record.prefill,
        decode=record.decode,
        attempts_prefill=record.pa,
        attempts_decode=record.da,
        workers_lost=record.losses,
        prompt_tokens=record.prompt_len,
        completion_tokens=record.n_out,
        error=record.error if record.state is RequestState.FAILED else "",
        seconds=round(record.stages["e2e"], 6),
        ended_s=round(ago, 1),
        bar=bar(record.stages),
    )
