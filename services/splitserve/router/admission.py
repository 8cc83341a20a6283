"""Who may come in: bounds on what waits for a worker, by requests and by prompt tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from splitserve.config import RoutingSettings
from splitserve.errors import Overloaded
from splitserve.router.refusals import TooManyRequests, TooManyTokens


@dataclass(frozen=True, slots=True)
class Waiting:
    """What has no decode worker yet."""

    requests: int
    tokens: int


def refusal(settings: RoutingSettings, waiting: Waiting, tokens: int, tokens_per_s: float) -> Overloaded | None:
    """The error for a request of `tokens` prompt tokens, None when it may come in.

    A prompt larger than the whole bound is let in when nothing waits, so that the bound never forbids a size.
    """
    retry = max(1.0, math.ceil(waiting.tokens / max(tokens_per_s, 1.0)))
    if waiting.requests >= settings.max_waiting_requests:
        return TooManyRequests(
            f"{waiting.requests} requests wait for a worker, the limit is {settings.max_waiting_requests}: "
            f"try again in {retry:.0f} s",
            retry_after_s=retry,
        )
    if waiting.tokens and waiting.tokens + tokens > settings.max_queued_tokens:
        return TooManyTokens(
            f"{waiting.tokens} prompt tokens wait for a worker and this request has {tokens}, "
            f"the limit is {settings.max_queued_tokens}: try again in {retry:.0f} s",
            retry_after_s=retry,
        )
    return None
