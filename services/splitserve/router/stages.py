"""Where a request's time went (docs/metrics.md): boundaries on the router's clock, durations inside shipped as durations.

    ttft      = tokenise + place + reserve + prefill_bus + prefill_queue + prefill + other   (the endpoint adds detokenise)
    first_gap = handle + decode_queue + transfer + first_step + gap_other

`other` and `gap_other` are what is left, so the sums hold by construction. `prefill_bus` is what passed here between asking
the prefill worker and having its first token, less what its engine spent by its own clock: both ways over the bus, and the
step that the engine was in when the job came.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

TTFT_PARTS = ("place", "reserve", "prefill_bus", "prefill_queue", "prefill")
GAP_PARTS = ("handle", "decode_queue", "transfer", "first_step")


class Stages:
    """One request's stopwatch. Seconds. The first value of each part stays: retries show in `other`."""

    def __init__(self, now: float) -> None:
        self._began = now
        self._asked: float | None = None
        self._prefill_asked: float | None = None
        self._waited = 0.0  # where the prompt was not read after all
        self._first_token: float | None = None
        self._second_token: float | None = None
        self._parts: dict[str, float] = {}

    def tokenised(self, seconds: float) -> None:
        """Spent before this stopwatch began; `ttft` and `e2e` contain it."""
        self._began -= seconds
        self._parts["tokenise"] = seconds

    def asked(self, now: float) -> None:
        """The first decode worker was asked."""
        if self._asked is None:
            self._asked = now
            self._parts["place"] = now - self._began - self._parts.get("tokenise", 0.0)

    def reserved(self, now: float) -> None:
        if self._asked is not None and self._first_token is None:
            self._parts.setdefault("reserve", now - self._asked)

    def prefill_asked(self, now: float) -> None:
        self._prefill_asked = now

    def moved(self, now: float) -> None:
        """A prompt that waited is read elsewhere: it has queued since it was asked for, or reserved where decode reads it."""
        since = self._prefill_asked
        if since is None and self._asked is not None:
            since = self._asked + self._parts.get("reserve", 0.0)
        if since is not None:
            self._waited += now - since
        self._prefill_asked = now

    def prefill_told(self, now: float, worked_s: float) -> None:
        """The prefill worker's first token is here; by its own clock it had the job for `worked_s`."""
        if self._prefill_asked is not None and self._first_token is None:
            self._parts.setdefault("prefill_bus", max(0.0, now - self._prefill_asked - worked_s))

    def prefilled(self, queue_s: float, prefill_s: float) -> None:
        """What the worker that read the prompt measured."""
        self._parts.setdefault("prefill_queue", self._waited + queue_s)
        self._parts.setdefault("prefill", prefill_s)

    def loaded(self, handle_s: float, transfer_s: float) -> None:
        self._parts.setdefault("handle", handle_s)
        self._parts.setdefault("transfer", transfer_s)

    def stepped(self, queue_s: float, first_step_s: float) -> None:
        """What the decode worker measured of its first token after a transfer."""
        self._parts.setdefault("decode_queue", queue_s)
        self._parts.setdefault("first_step", first_step_s)

    def tokens(self, now: float, length: int) -> bool:
        """The first answer has `length` tokens now. False: its second is here, and no later one is asked for."""
        if length >= 1 and self._first_token is None:
            self._first_token = now
        elif length >= 2 and self._second_token is None:
            self._second_token = now
        return self._second_token is None

    def seconds(self, now: float) -> dict[str, float]:
        """Every stage known so far, and the sums `ttft`, `first_gap`, `e2e`."""
        out = dict(self._parts)
        out["e2e"] = now - self._began
        if self._first_token is not None:
            out["ttft"] = self._first_token - self._began
            left = out["ttft"] - sum(out.get(part, 0.0) for part in ("tokenise", *TTFT_PARTS))
            if left < 0 and "reserve" in out:  # a decode worker that reads the prompt itself began before we heard so
                out["reserve"] = max(0.0, out["reserve"] + left)
                left = out["ttft"] - sum(out.get(part, 0.0) for part in ("tokenise", *TTFT_PARTS))
            out["other"] = left
            if self._second_token is not None:
                out["first_gap"] = self._second_token - self._first_token
                out["gap_other"] = out["first_gap"] - sum(out.get(part, 0.0) for part in GAP_PARTS)
        return out


def breakdown(
    prompts: Sequence[Mapping[str, float]], *, tokenise_s: float, detokenise_s: float, first_token_s: float
) -> dict[str, float]:
    """The stages of one HTTP request's time to first token: of the prompt whose token came first, with what the endpoint
    did itself. `first_token_s`: arrival to that token; detokenising it came after."""
    first = first_read(prompts)
    told = {"tokenise": tokenise_s, **{part: first.get(part, 0.0) for part in TTFT_PARTS}}
    return {**told, "other": max(0.0, first_token_s - sum(told.values())), "detokenise": detokenise_s}


def first_read(prompts: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """The stages of the prompt whose token came first; {} of none."""
    return min(prompts, key=lambda stages: stages.get("ttft", float("inf")), default={})


def gap_breakdown(stages: Mapping[str, float]) -> dict[str, float]:
    """The stages of one prompt's first gap; none when its KV was not moved, or there was no second token."""
    if "first_gap" not in stages or "transfer" not in stages:
        return {}
    parts = {part: stages.get(part, 0.0) for part in GAP_PARTS}
    return {**parts, "gap_other": max(0.0, stages["gap_other"])}
