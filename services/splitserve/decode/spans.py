"""A decode worker's spans: `kv_transfer` while a handle's blocks are fetched, `decode` from then to the last token.

In `decode` lie `queue` and `first_step` (of a prompt that is read here: `queue` and `prefill`), as the engine measured
them. The span counts tokens; no token has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitserve.decode.effects import Fetch, Fetched, FetchFailed
from splitserve.engine import door
from splitserve.protocol.effects import Received
from splitserve.protocol.messages import Amend, DecodeJob
from splitserve.protocol.trace import TraceContext
from splitserve.telemetry.tracing import Span, SpanKind, Tracer
from splitserve.worker.effects import EngineBatch, ToEngine


@dataclass(slots=True)
class _Job:
    """One attempt, from its place in the engine until nothing of it is left there."""

    trace: TraceContext
    attributes: dict[str, str | int]
    transfer: Span | None = None
    decode: Span | None = None
    tokens: int = 0


class DecodeSpans:
    """A `runtime.shell.Watch`."""

    def __init__(self, tracer: Tracer, worker: str) -> None:
        self._tracer = tracer
        self._worker = worker
        self._jobs: dict[door.Key, _Job] = {}

    def __call__(self, event: object, commands: Sequence[object], now: float) -> None:
        match event:
            case EngineBatch(batch):
                for happened in batch.events:
                    job = self._jobs.get(happened.key)
                    if job is not None:
                        self._happened(happened, job, now)
            case Fetched() | FetchFailed():
                self._transferred(event, now)
            case _:
                pass
        for command in commands:
            match command:
                case ToEngine(door.Add() as add):
                    self._added(add, event, now)
                case ToEngine(door.Loaded(key=key)):
                    self._decode(key, now)
                case Fetch():
                    self._fetch(command, now)
                case _:
                    pass

    def _added(self, add: door.Add, event: object, now: float) -> None:
        asked = event.message if isinstance(event, Received) else None
        if not isinstance(asked, DecodeJob | Amend) or not asked.trace.sampled:
            return
        self._jobs[add.key] = _Job(
            asked.trace,
            {
                "splitserve.request.id": asked.rid,
                "splitserve.worker": self._worker,
                "splitserve.decode.attempt": asked.da,
                "splitserve.first_index": max((len(ids) for ids in asked.outputs), default=0),
            },
        )
        if add.mode is door.Mode.LOCAL:
            self._decode(add.key, now)

    def _fetch(self, command: Fetch, now: float) -> None:
        job = self._jobs.get(command.key)
        if job is not None:
            source = {
                "splitserve.prefill.worker": command.handle.owner,
                "splitserve.prefill.attempt": command.handle.pa,
            }
            attributes = {**job.attributes, **source}
            job.transfer = self._tracer.start("kv_transfer", job.trace, now, attributes, SpanKind.CONSUMER)

    def _transferred(self, event: Fetched | FetchFailed, now: float) -> None:
        job = self._jobs.get(event.key)
        if job is None or job.transfer is None:
            return
        if isinstance(event, FetchFailed):
            job.transfer.end(now, str(event.reason))
            return
        moved = {"transport": event.transport, "bytes": event.bytes, "blocks": event.blocks}
        job.transfer.set({f"splitserve.kv.{name}": value for name, value in moved.items()})
        job.transfer.end(now)

    def _decode(self, key: door.Key, now: float) -> None:
        job = self._jobs.get(key)
        if job is not None:
            job.decode = self._tracer.start("decode", job.trace, now, job.attributes, SpanKind.CONSUMER)

    def _happened(self, event: door.Event, job: _Job, now: float) -> None:
        match event:
            case door.TokenEvent():
                job.tokens += len(event.ids)
                if event.queue_s is not None and job.decode is not None:
                    self._first_step(event, event.queue_s, job.decode, now)
            case door.Gone():
                self._end(event.key, job, now)
            case door.Rejected() | door.Preempted() | door.Failed():
                self._end(event.key, job, now, type(event).__name__.lower())
            case _:
                pass

    def _first_step(self, event: door.TokenEvent, queue_s: float, decode: Span, now: float) -> None:
        name, seconds = ("prefill", event.prefill_s) if event.prefill_s else ("first_step", event.first_step_s)
        began = now - seconds
        self._tracer.start("queue", decode.trace, began - queue_s, {}).end(began)
        self._tracer.start(name, decode.trace, began, {"splitserve.cached_tokens": event.cached_tokens}).end(now)

    def _end(self, key: door.Key, job: _Job, now: float, error: str = "") -> None:
        del self._jobs[key]
        if job.decode is not None:
            job.decode.set({"splitserve.decoded_tokens": job.tokens})
            job.decode.end(now, error)
