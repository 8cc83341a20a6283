"""Made-up snapshots, and the page that shows them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from splitserve.protocol.status import LinkView, LoadView, RequestView, RouterView, Snapshot, WorkerView
from splitserve.router.status.feed import StatusFeed
from support.generation import ScriptedGenerator, says, served

ROUTER = RouterView("router-0", "org/small", "0.1.0", 4000.0, "", bus_up=True, degraded=False)
LOAD = LoadView(
    states={"queued": 0, "prefilling": 1, "transferring": 1, "decoding": 2},
    waiting=0,
    waiting_tokens=0,
    tokens_per_s=412.0,
    ttft_s=0.184,
    inter_token_s=0.0213,
    outcomes={"finished": 31, "cancelled": 2, "failed": 0},
)
BAR = (
    ("place", 0.001), ("reserve", 0.004), ("prefill_queue", 0.02), ("prefill", 0.15), ("other", 0.009),
    ("handle", 0.002), ("transfer", 0.011), ("decode_queue", 0.003), ("first_step", 0.02), ("gap_other", 0.004),
    ("decode", 0.9),
)  # fmt: skip


def worker(name: str, role: str, **changes: Any) -> WorkerView:
    fields: dict[str, Any] = {
        "state": "serving", "running": 3, "waiting": 1, "queued_tokens": 120, "requests": 2, "kv_blocks": 1000,
        "kv_used": 0.34, "kv_promised": 0.5, "step_age_s": 0.02, "silent_s": 0.2, "since_s": 700.0,
    }  # fmt: skip
    return WorkerView(name, role, **(fields | changes))


def request(id: str, state: str = "finished", **changes: Any) -> RequestView:
    fields: dict[str, Any] = {
        "prefill": "prefill-0", "decode": "decode-0", "attempts_prefill": 1, "attempts_decode": 1, "workers_lost": 0,
        "prompt_tokens": 812, "completion_tokens": 64, "error": "", "seconds": 1.124, "ended_s": 4.0, "bar": BAR,
    }  # fmt: skip
    return RequestView(id, state, **(fields | changes))


def cluster(prefill: int = 2, decode: int = 2, **changes: Any) -> Snapshot:
    """A busy fleet of so many workers."""
    workers = [worker(f"prefill-{n}", "prefill", kv_used=0.1 * (n % 9)) for n in range(prefill)]
    workers += [worker(f"decode-{n}", "decode", kv_used=0.14 * (n % 7)) for n in range(decode)]
    links = [LinkView("prefill-0", f"decode-{n}", 2, moving=n % 2) for n in range(decode if prefill else 0)]
    live = [request(f"chatcmpl-{n:032x}", "decoding", ended_s=None) for n in range(1, 3)]
    recent = [
        request("chatcmpl-" + "a" * 32),
        request("chatcmpl-" + "b" * 32, "failed", error="loss_budget_spent", attempts_decode=9, workers_lost=8),
        request("cmpl-" + "c" * 32, "cancelled", prefill="", decode="decode-0"),
    ]
    whole = Snapshot(1, ROUTER, LOAD, tuple(workers), tuple(links), tuple(live), len(live), tuple(recent))
    return replace(whole, **changes)


def empty() -> Snapshot:
    """Nobody there."""
    load = replace(LOAD, states={"queued": 0}, ttft_s=None, inter_token_s=None, tokens_per_s=0.0)
    router = replace(ROUTER, why_not_ready="no decode worker lives")
    return cluster(0, 0, router=router, load=load, live=(), live_total=0, recent=())


@asynccontextmanager
async def status_page(look: Callable[[], Snapshot], **changes: Any) -> AsyncGenerator[int, None]:
    """The page of a router that shows `look()`, ten times a second, on a free port."""
    feed = StatusFeed(lambda now: look(), every_s=0.1)
    async with served(ScriptedGenerator(says("ok")), status=feed, **changes) as port:
        try:
            yield port
        finally:
            feed.close()
