"""The router's spans: a request as its client sees it, in it `tokenise`, and for each prompt `generate` with `place` and
`reserve`. Workers' spans are children of `generate`; what moved a request to another worker is an event of it.

Names are those of OpenTelemetry's conventions for generative AI, `splitserve.*` beside them. Never a word of a prompt or
an answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from splitserve.protocol.trace import NO_TRACE, TraceContext
from splitserve.router.generation import Submission
from splitserve.router.observe import RequestEnd, RequestObserver
from splitserve.router.records import Record
from splitserve.telemetry.tracing import Span, SpanKind, Tracer

OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}


class Asked(Protocol):
    """What is told of a request once its prompts are ids."""

    @property
    def rid(self) -> str: ...
    @property
    def submissions(self) -> Sequence[Submission]: ...


class RequestSpan:
    """The root span of one HTTP request; a `RequestObserver` that passes on to another what it hears."""

    def __init__(
        self,
        tracer: Tracer,
        watch: RequestObserver,
        caller: TraceContext,
        *,
        route: str,
        model: str,
        arrived: float,
        stream: bool,
    ) -> None:
        self.gap, self.live = watch.gap, watch.live  # a token costs nothing here
        self._watch = watch
        self._tracer = tracer
        self._arrived = arrived
        operation = OPERATIONS.get(route, route)
        attributes: dict[str, str | bool] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "splitserve",
            "gen_ai.request.model": model,
            "gen_ai.request.stream": stream,
            "gen_ai.response.model": model,
            "http.request.method": "POST",
            "http.route": route,
        }
        self._span = tracer.start(f"{operation} {model}", caller, arrived, attributes, SpanKind.SERVER)

    @property
    def trace(self) -> TraceContext:
        """For what is done for this request."""
        return self._span.trace

    def asked(self, job: Asked) -> None:
        """Its parameters are known."""
        if not self._span.recording:
            return
        first = job.submissions[0]
        params, n = first.params, len(first.seeds)
        attributes: dict[str, str | int | float] = {
            "gen_ai.response.id": job.rid,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.frequency_penalty": params.frequency_penalty,
            "gen_ai.request.presence_penalty": params.presence_penalty,
            "splitserve.prompts": len(job.submissions),
        }
        if params.top_k > 0:
            attributes["gen_ai.request.top_k"] = params.top_k
        if n > 1:
            attributes["gen_ai.request.choice.count"] = n
        if first.client_request_id:
            attributes["splitserve.client_request_id"] = first.client_request_id
        self._span.set(attributes)

    # --- observe.RequestObserver ---

    def tokenised(self, seconds: float) -> None:
        self._watch.tokenised(seconds)
        now = time.monotonic()
        self._tracer.start("tokenise", self._span.trace, now - seconds, {}).end(now)

    def first_token(self, seconds: float) -> None:
        self._watch.first_token(seconds)
        self._span.set({"gen_ai.response.time_to_first_chunk": seconds})
        self._span.event("splitserve.first_token", self._arrived + seconds)

    def end(self, end: RequestEnd) -> None:
        self._watch.end(end)
        self._span.set({
            "gen_ai.usage.input_tokens": sum(end.prompt_tokens),
            "gen_ai.usage.output_tokens": sum(end.generation_tokens),
            "gen_ai.usage.cache_read.input_tokens": end.cached_tokens,
            "gen_ai.response.finish_reasons": end.finish_reasons,
            "splitserve.outcome": end.outcome,
        })  # fmt: skip
        self._span.end(time.monotonic(), end.code)


@dataclass(slots=True)
class _Running:
    span: Span
    began: float
    losses: int = 0
    da: int | None = None  # of the decode worker that accepted last
    decode: str = ""


class GenerationSpans:
    """Spans of what the dispatcher runs, by request id. It reads records, so a token costs nothing."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._running: dict[str, _Running] = {}

    def begin(self, submission: Submission, now: float) -> Submission:
        """The submission as workers are to be told of it."""
        if submission.trace == NO_TRACE:  # a readiness probe: nobody's request
            return submission
        attributes = {
            "splitserve.request.id": submission.rid,
            "gen_ai.usage.input_tokens": len(submission.ids),
        }
        span = self._tracer.start("generate", submission.trace, now, attributes)
        if span.recording:
            self._running[submission.rid] = _Running(span, now)
        return replace(submission, trace=span.trace)

    def saved(self, record: Record, now: float) -> None:
        """A request's latest state."""
        running = self._running.get(record.rid)
        if running is None:
            return
        self._moved(running, record, now)
        if record.state.terminal:
            del self._running[record.rid]
            self._end(running, record, now)

    def _moved(self, running: _Running, record: Record, now: float) -> None:
        if record.losses > running.losses:
            running.losses = record.losses
            lost = {"splitserve.decode.worker": running.decode, "splitserve.output_tokens": record.n_out}
            running.span.event("splitserve.decode_lost", now, lost)
        if not record.decode or record.da == running.da:
            return
        if running.da is not None:
            attributes = {
                "splitserve.decode.worker": record.decode,
                "splitserve.decode.worker.before": running.decode,
                "splitserve.decode.attempt": record.da,
                "splitserve.prefill.attempt": record.pa,
                "splitserve.output_tokens": record.n_out,
            }
            running.span.event("splitserve.resume", now, attributes)
        running.da, running.decode = record.da, record.decode

    def _end(self, running: _Running, record: Record, now: float) -> None:
        at = running.began
        for stage in ("place", "reserve"):
            if stage in record.stages:
                span = self._tracer.start(stage, running.span.trace, at, {})
                at += record.stages[stage]
                span.end(at)
        running.span.set({
            "gen_ai.usage.output_tokens": record.n_out,
            "splitserve.state": str(record.state),
            "splitserve.prefill.worker": record.prefill,
            "splitserve.decode.worker": record.decode,
            "splitserve.prefill.attempts": record.pa,
            "splitserve.decode.attempts": record.da,
            "splitserve.workers_lost": record.losses,
        })  # fmt: skip
        running.span.end(now, record.error)
