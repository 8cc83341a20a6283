"""The undisturbed run: which token may come after some ids, and how an answer ends. Exact, or "bf16".

In bf16 each sampling adds a free variant, as kernels that sum in another order do: two runs of one prompt then part for
good, and a token of the one never continues the other.
"""

from __future__ import annotations

from simulation.plan import ClientPlan
from splitserve.engine.sequence import finish_reason
from splitserve.protocol.states import FinishReason
from support.toy_runner import toy_token

VOCABULARY = 1 << 16  # large, so that a wrong history has no lucky token
VARIANTS = 4
EOS_IDS = frozenset(range(0, VOCABULARY, 16))
MAX_MODEL_LEN = 600


class Reference:
    """What a client may hear."""

    def __init__(self, free_variant: bool) -> None:
        self._variants = VARIANTS if free_variant else 1

    def allows(self, plan: ClientPlan, choice: int, delivered: list[int], token: int) -> bool:
        """Whether `token` continues prompt and delivered ids; in the exact mode only one does."""
        ids = (*plan.ids, *delivered)
        seed, index = plan.seeds[choice], len(delivered)
        return any(token == toy_token(ids, seed, index, VOCABULARY, v) for v in range(self._variants))

    def end(self, plan: ClientPlan, delivered: list[int]) -> FinishReason:
        """How an answer with these ids has ended, RUNNING when it has not."""
        if not delivered:
            return FinishReason.RUNNING
        stop_ids = frozenset[int]() if plan.params.ignore_eos else EOS_IDS
        total = len(plan.ids) + len(delivered)
        return finish_reason(delivered[-1], len(delivered), total, plan.params, stop_ids, MAX_MODEL_LEN)
