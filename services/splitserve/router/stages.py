"""Where a request's time went (docs/metrics.md): boundaries on the router's clock, durations inside shipped as durations.

    ttft      = place + reserve + prefill_queue + prefill + other        (the endpoint adds tokenise and detokenise)
    first_gap = handle + decode_queue + transfer + first_step + gap_other

`other` and `gap_other` are what is left, so the sums hold by construction.
"""

from __future__ import annotations

TTFT_PARTS = ("place", "reserve", "prefill_queue", "prefill")
GAP_PARTS = ("handle", "decode_queue", "transfer", "first_step")


class Stages:
    """One request's stopwatch. Seconds. The first value of each part stays: retries show in `other`."""

    def __init__(self, now: float) -> None:
        self._began = now
        self._asked: float | None = None
        self._first_token: float | None = None
        self._second_token: float | None = None
        self._parts: dict[str, float] = {}

    def asked(self, now: float) -> None:
        """The first decode worker was asked."""
        if self._asked is None:
            self._asked = now
            self._parts["place"] = now - self._began

    def reserved(self, now: float) -> None:
        if self._asked is not None and self._first_token is None:
            self._parts.setdefault("reserve", now - self._asked)

    def prefilled(self, queue_s: float, prefill_s: float) -> None:
        """What the worker that read the prompt measured."""
        self._parts.setdefault("prefill_queue", queue_s)
        self._parts.setdefault("prefill", prefill_s)

    def loaded(self, handle_s: float, transfer_s: float) -> None:
        self._parts.setdefault("handle", handle_s)
        self._parts.setdefault("transfer", transfer_s)

    def stepped(self, queue_s: float, first_step_s: float) -> None:
        """What the decode worker measured of its first token after a transfer."""
        self._parts.setdefault("decode_queue", queue_s)
        self._parts.setdefault("first_step", first_step_s)

    def tokens(self, now: float, length: int) -> None:
        """The first answer has `length` tokens now."""
        if length >= 1 and self._first_token is None:
            self._first_token = now
        elif length >= 2 and self._second_token is None:
            self._second_token = now

    def seconds(self, now: float) -> dict[str, float]:
        """Every stage known so far, and the sums `ttft`, `first_gap`, `e2e`."""
        out = dict(self._parts)
        out["e2e"] = now - self._began
        if self._first_token is not None:
            out["ttft"] = self._first_token - self._began
            out["other"] = out["ttft"] - sum(out.get(part, 0.0) for part in TTFT_PARTS)
            if self._second_token is not None:
                out["first_gap"] = self._second_token - self._first_token
                out["gap_other"] = out["first_gap"] - sum(out.get(part, 0.0) for part in GAP_PARTS)
        return out
