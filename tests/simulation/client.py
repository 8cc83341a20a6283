"""A client: submits, listens, stops early or leaves; and holds every event against what it was promised."""

from __future__ import annotations

from simulation.invariants import require
from simulation.plan import ClientPlan
from simulation.reference import Reference
from splitserve.protocol.states import FinishReason
from splitserve.router.generation import Done, Finished, GenerationEvent, Tokens
from support.toy_runner import toy_logprob

PARTS_S = 1e-6  # what the sum of stages may differ from the whole by rounding


class Client:
    """One request's client side. `gone`: it left, or its router died; nothing is owed to it."""

    def __init__(self, rid: str, plan: ClientPlan, reference: Reference) -> None:
        self.rid = rid
        self.plan = plan
        self.outputs: list[list[int]] = [[] for _ in plan.seeds]
        self.ends: list[FinishReason | None] = [None] * len(plan.seeds)
        self.stopped: set[int] = set()
        self.done: Done | None = None
        self.began_at = plan.at
        self.done_at = 0.0
        self.submitted = False
        self.gone = False
        self._reference = reference

    @property
    def outcome(self) -> str:
        """One word for the count of how requests end."""
        if self.gone:
            return "left"
        if self.done is None:
            return "open"
        return "finished" if self.done.error is None else type(self.done.error).__name__

    def take(self, event: GenerationEvent, now: float) -> int | None:
        """Check one event; returns a choice that this client wants to stop at it."""
        require(self.done is None, "one_terminal_event", f"{self.rid} hears {event} after {self.done}")
        if isinstance(event, Tokens):
            return self._tokens(event)
        if isinstance(event, Finished):
            self._finished(event)
        else:
            self._done(event, now)
        return None

    def _tokens(self, event: Tokens) -> int | None:
        delivered = self.outputs[event.choice]
        where = f"{self.rid}[{event.choice}]"
        rule = "tokens_are_gapless_and_as_undisturbed"
        require(bool(event.ids), rule, f"{where}: an event without tokens")
        require(event.first_index == len(delivered), rule, f"{where} has {len(delivered)}, hears {event}")
        require(self.ends[event.choice] is None, rule, f"{where} ended with {self.ends[event.choice]!r}, hears {event}")
        wanted = event.ids if self.plan.params.logprobs is not None else ()
        told = tuple(logprob.logprob for logprob in event.logprobs)
        require(told == tuple(map(toy_logprob, wanted)), "each_token_has_its_logprob", f"{where}: {event}")
        for token in event.ids:
            ended = self._reference.end(self.plan, delivered)
            require(ended is FinishReason.RUNNING, rule, f"{where}: {token} after the end {ended!r} of {delivered}")
            allowed = self._reference.allows(self.plan, event.choice, delivered, token)
            require(allowed, rule, f"{where}: {token} does not continue {delivered}")
            delivered.append(token)
        if self.plan.stop is None or event.choice in self.stopped:
            return None
        choice, index = self.plan.stop
        return choice if choice == event.choice and len(delivered) > index else None

    def _finished(self, event: Finished) -> None:
        rule = "tokens_are_gapless_and_as_undisturbed"
        where = f"{self.rid}[{event.choice}]"
        require(self.ends[event.choice] is None, rule, f"{where} ends twice: {event}")
        due = self._reference.end(self.plan, self.outputs[event.choice])
        if event.choice not in self.stopped and event.reason is not FinishReason.ERROR:
            require(event.reason == due, rule, f"{where} ends with {event.reason!r} where {due!r} is due")
        self.ends[event.choice] = event.reason

    def _done(self, event: Done, now: float) -> None:
        self.done, self.done_at = event, now
        for choice in range(len(self.outputs)) if event.error is None else ():
            ended = self.ends[choice] is not None or choice in self.stopped
            require(ended, "one_terminal_event", f"{self.rid} is done, answer {choice} has not ended")
        stages_sum_to_the_whole(self.rid, event)


def stages_sum_to_the_whole(rid: str, done: Done) -> None:
    """Invariant 13."""
    for whole, parts in SUMS.items():
        if whole in done.stages:
            total = sum(done.stages.get(part, 0.0) for part in parts)
            text = f"{rid}: {whole} is {done.stages[whole]}, its parts give {total}"
            require(abs(total - done.stages[whole]) < PARTS_S, "stages_sum_to_the_whole", text)


SUMS = {
    "ttft": ("place", "reserve", "prefill_bus", "prefill_queue", "prefill", "other"),
    "first_gap": ("handle", "decode_queue", "transfer", "first_step", "gap_other"),
}
