"""For each rule of the cores, runs in which it has work to do. `test_rules` shows that without it they break or cost more."""

from __future__ import annotations

from simulation.faults import Network
from simulation.hunt import Blow, Focus
from simulation.plan import Fate


def lost(*kinds: str, share: float = 0.5) -> Network:
    return Network(drop=share, only=frozenset(kinds))


def doubled(*kinds: str, share: float = 0.5) -> Network:
    return Network(double=share, only=frozenset(kinds))


def late(*kinds: str, share: float = 0.5) -> Network:
    return Network(delay=share, only=frozenset(kinds))


SLEEPING_READER = Focus(  # gives its first token when the request has long been given to another
    "crawl",
    blow=Blow(Fate.FREEZE, "prefill", (2.3, 3.0), within_s=0.5),
    cluster={"free_variant": True, "split": "always", "chunk_tokens": 64, "step_s": (0.4, 0.8)},
    seeds=200,
)
REMOTE = {"split": "always"}

FOCUSES: dict[str, Focus] = {
    "router.guard_da": Focus(
        "lossy",
        Network(drop=0.3, delay=0.3, late=(1.0, 4.0), only=frozenset({"KvReady", "KvLoaded", "TokenFrame"})),
        cluster={"free_variant": True, "split": "always"},
        seeds=200,
    ),
    "router.guard_pa": SLEEPING_READER,
    "router.index_once": Focus("lossy"),
    "router.amend_new_number": Focus("race", seeds=200),
    "router.fresh_slots": Focus("race", doubled("FinAck", "TokenFrame")),
    "router.own_beat_rule": Focus("crawl", blow=Blow(Fate.PARTITION, "router", (2.2, 3.5)), costs=True),
    "router.forward_kv_ready": Focus("lossy", lost("KvReady"), cluster=REMOTE, costs=True),
    "router.forward_after_digest": Focus("lossy", lost("KvReady"), cluster=REMOTE),
    "router.resume_gaps": Focus("lossy", lost("TokenFrame"), costs=True),
    "router.resume_before_replacing": Focus("crawl", late("Digest", "Accepted"), costs=True),
    "router.digest_repairs": Focus("long", lost("Preempted", share=1.0)),
    "router.digest_cancels": Focus("lossy", lost("Cancel", "FinAck"), cluster={"lease_ttl_s": 1.0}),
    "router.cancel_unanswered": Focus("crawl", lost("Accepted"), costs=True),
    "router.same_numbers_after_outage": Focus(
        "crawl", Network(latency=(0.01, 0.1)), Blow(Fate.CUT, "router", (0.1, 0.5), within_s=0.2), costs=True
    ),
    "router.progress_timer": Focus(
        "crawl", blow=Blow(Fate.PARTITION, "prefill", (4.0, 8.0)), cluster=REMOTE, costs=True
    ),
    "router.pause_when_sick": Focus("crawl", blow=Blow(Fate.PARTITION, "router", (1.5, 3.5)), costs=True),
    "router.renew_while_transferring": Focus(
        "crawl", blow=Blow(Fate.KILL, "decode", (4.0, 8.0)), cluster={"split": "always", "decode": 1}, costs=True
    ),
    "router.queue_age": Focus("crawl", blow=Blow(Fate.KILL, "decode", (8.0, 12.0)), cluster={"decode": 1}),
    "router.loss_budget": Focus("poison"),
    "router.prefill_losses": Focus("poison", cluster={"split": "always", "prefill": 5}),
    "worker.tombstones": Focus("lossy", doubled("DecodeJob", "PrefillJob")),
    "worker.same_number_same_answer": Focus("lossy", doubled("DecodeJob", "PrefillJob")),
    "worker.stale_incarnation": Focus(
        "crawl", doubled("PrefillJob", "DecodeJob"), Blow(Fate.KILL, "prefill", (0.0, 0.3))
    ),
    "worker.guard_pa_awaited": SLEEPING_READER,
    "worker.hold_while_computing": Focus(
        "crawl", Network(), cluster={"split": "always", "lease_ttl_s": 0.3}, costs=True
    ),
    "worker.validate_before_index": Focus("race"),
    "worker.free_after_copy": Focus("race", Network(), cluster=REMOTE, leave_within_s=0.6),
    "worker.keep_until_finack": Focus("lossy", lost("TokenFrame"), costs=True),
    "worker.promise": Focus("tiny"),
}
