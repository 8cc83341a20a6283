"""A prefill worker's spans: `prefill` from acceptance to KvReady, in it `queue` and `compute` as the engine measured them."""

from __future__ import annotations

from collections.abc import Sequence

from splitserve.engine import door
from splitserve.protocol.effects import Received
from splitserve.protocol.messages import PrefillJob
from splitserve.telemetry.tracing import Span, SpanKind, Tracer
from splitserve.worker.effects import EngineBatch, ToEngine


class PrefillSpans:
    """A `runtime.shell.Watch`. A job's span is open while the engine has the job."""

    def __init__(self, tracer: Tracer, worker: str) -> None:
        self._tracer = tracer
        self._worker = worker
        self._open: dict[door.Key, Span] = {}

    def __call__(self, event: object, commands: Sequence[object], now: float) -> None:
        if isinstance(event, EngineBatch):
            for happened in event.batch.events:
                span = self._open.get(happened.key)
                if span is not None:
                    self._happened(happened, span, now)
        for command in commands:
            match command:
                case ToEngine(door.Abort(key=key)):
                    self._end(key, now, "cancelled")
                case ToEngine(door.Add()) if isinstance(event, Received) and isinstance(event.message, PrefillJob):
                    self._accepted(event.message, now)
                case _:
                    pass

    def _accepted(self, asked: PrefillJob, now: float) -> None:
        attributes = {
            "splitserve.request.id": asked.rid,
            "splitserve.worker": self._worker,
            "splitserve.prefill.attempt": asked.pa,
            "splitserve.prompt_tokens": len(asked.ids),
        }
        span = self._tracer.start("prefill", asked.trace, now, attributes, SpanKind.CONSUMER)
        if span.recording:
            self._open[(asked.rid, asked.pa)] = span

    def _happened(self, event: door.Event, span: Span, now: float) -> None:
        match event:
            case door.Prefilled():
                began = now - event.prefill_s
                self._tracer.start("queue", span.trace, began - event.queue_s, {}).end(began)
                cached = {"splitserve.cached_tokens": event.cached_tokens}
                self._tracer.start("compute", span.trace, began, cached).end(now)
                self._end(event.key, now)
            case door.Rejected() | door.Preempted() | door.Failed() | door.Gone():
                self._end(event.key, now, type(event).__name__.lower())
            case _:
                pass

    def _end(self, key: door.Key, now: float, error: str = "") -> None:
        span = self._open.pop(key, None)
        if span is not None:
            span.end(now, error)
