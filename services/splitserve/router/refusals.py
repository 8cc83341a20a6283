"""Requests that were not taken: which errors say so, and the reason that is counted."""

from __future__ import annotations

from splitserve.errors import MessageTooLarge, NoWorkers, Overloaded, RequestError, SplitserveError, Unavailable, row_of


class TooManyRequests(Overloaded):
    """`--max-waiting-requests` is reached."""


class TooManyTokens(Overloaded):
    """`--max-queued-tokens` is reached."""


class WaitedTooLong(Overloaded):
    """Nobody took it for `--queue-timeout`."""


# the first that fits; bounds at the door have vLLM's names
_REASONS: tuple[tuple[type[SplitserveError], str], ...] = (
    (TooManyRequests, "max_num_queued_reqs"),
    (TooManyTokens, "max_num_queued_tokens"),
    (WaitedTooLong, "queue_timeout"),
    (NoWorkers, "no_workers"),
    (Unavailable, "unavailable"),
)
GENERATION_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
AT_THE_DOOR = ("max_num_queued_reqs", "max_num_queued_tokens")


def refusal_reason(error: SplitserveError) -> str:
    """Why a request that got no token was not taken; "" when it was taken, and lost."""
    for kind, reason in _REASONS:
        if isinstance(error, kind):
            return reason
    return row_of(error).code if isinstance(error, RequestError | Overloaded | MessageTooLarge) else ""
