"""Everything known of one live request, and the small things that are done with it; what happens *when* is lifecycle's."""

from __future__ import annotations

from splitserve.config import RoutingSettings
from splitserve.errors import ContextTooLong, MessageTooLarge, NoWorkers, SplitserveError, row_of
from splitserve.protocol.messages import FirstRow, KvReady, Refused, ResumeRow
from splitserve.protocol.states import RefuseReason, RequestState, is_probe
from splitserve.router.account import Life
from splitserve.router.desk import Desk, Wait
from splitserve.router.effects import Deliver, Save
from splitserve.router.generation import GenerationEvent, Submission
from splitserve.router.legs import DecodeLeg, PrefillLeg
from splitserve.router.placement import Split
from splitserve.router.records import Record
from splitserve.router.scout import Wish
from splitserve.router.stages import Stages
from splitserve.router.transcript import Transcript

LEAST_RETRY_S = 0.15
TOO_MUCH: dict[RefuseReason, type[SplitserveError]] = {
    RefuseReason.TOO_LONG: ContextTooLong,
    RefuseReason.TOO_LARGE: MessageTooLarge,
}
FOR_GOOD = {RefuseReason.MISMATCH, *TOO_MUCH}


class Request:
    """State of one request. `prefill` and `kv` are set only while a prefill is wanted; `da`, `pa`: numbers used last."""

    __slots__ = (
        "_came_at",
        "_desk",
        "_seq",
        "_too_much",
        "cached_tokens",
        "da",
        "decode",
        "decode_name",
        "kv",
        "live",
        "losses",
        "pa",
        "preemptions",
        "prefill",
        "prefill_losses",
        "prefill_name",
        "rid",
        "stages",
        "state",
        "submission",
        "transcript",
        "wish",
    )

    def __init__(self, submission: Submission, desk: Desk) -> None:
        self.submission = submission
        self.rid = submission.rid
        self.state = RequestState.QUEUED
        self.live = True  # no end yet
        self.transcript = Transcript(len(submission.seeds), index_once=desk.rules.index_once)
        self.stages = Stages(desk.now)
        self.wish = Wish(submission)
        self.decode: DecodeLeg | None = None
        self.prefill: PrefillLeg | None = None
        self.kv: KvReady | None = None  # from the current prefill, until decode has loaded it
        self.da = 0
        self.pa = 0
        self.losses = 0
        self.prefill_losses = 0
        self.preemptions = 0
        self.cached_tokens: int | None = None
        self.prefill_name = ""
        self.decode_name = ""
        self._came_at = desk.now
        self._seq = 0
        self._too_much: SplitserveError | None = None
        self._desk = desk

    @property
    def context(self) -> int:
        """Tokens that a new placement computes: the prompt, and for a single answer what is out of it."""
        outputs = self.transcript.outputs
        return len(self.submission.ids) + (len(outputs[0]) if len(outputs) == 1 else 0)

    def age(self, now: float) -> float:
        return now - self._came_at

    def is_current(self, da: int) -> bool:
        """The guard of everything that a decode worker says."""
        leg = self.decode
        return leg is not None and (leg.job.da == da or not self._desk.rules.guard_da)

    def resume_rows(self, worker: Life) -> list[ResumeRow]:
        """What to ask this worker for: the tokens behind ours of each open answer, or its KvReady."""
        decode, prefill = self.decode, self.prefill
        if decode is not None and decode.accepted and decode.life == worker:
            return [
                ResumeRow(self.rid, decode.da, decode.slot + choice, len(self.transcript.outputs[choice]))
                for choice, end in enumerate(self.transcript.ends)
                if end is None
            ]
        if prefill is not None and prefill.accepted and self.kv is None and prefill.life == worker:
            return [ResumeRow(self.rid, prefill.pa, 0, len(self.transcript.outputs[0]))]
        return []

    def to(self, state: RequestState, error: SplitserveError | None = None) -> None:
        """Change state, remembered outside."""
        if state is not self.state:
            self.count(f"{self.state}->{state}")
            self.state = state
            self.live = not state.terminal
            self.save(error)

    def save(self, error: SplitserveError | None = None) -> None:
        self._seq += 1
        sub = self.submission
        record = Record(
            rid=self.rid,
            owner=self._desk.outbox.router,
            seq=self._seq,
            state=self.state,
            model=sub.model,
            pa=self.pa,
            da=self.da,
            prefill=self.prefill_name,
            decode=self.decode_name,
            prompt_len=len(sub.ids),
            n_out=len(self.transcript),
            created=sub.created,
            timeout_s=sub.timeout_s,
            error=row_of(error).code if error is not None else "",
            client_request_id=sub.client_request_id,
            trace_id=sub.trace.trace_id,
            losses=self.losses,
            stages=self.stages.seconds(self._desk.now),
        )
        self._desk.outbox.put(Save(record))

    def deliver(self, event: GenerationEvent) -> None:
        if self.cached_tokens is None:  # nobody said: what says so later comes from a second reading
            self.cached_tokens = 0
        self._desk.outbox.put(Deliver(self.rid, event, self.cached_tokens))

    def cached(self, tokens: int) -> None:
        """Prompt tokens that were found cached where the prompt was first read; a second reading does not change it."""
        if self.cached_tokens is None:
            self.cached_tokens = min(tokens, len(self.submission.ids))

    def prefilled(self, leg: PrefillLeg, message: KvReady) -> None:
        """Take what the prefill worker measured."""
        times = message.durations
        self.stages.prefilled(times.queue_s, times.prefill_s)
        self.cached(message.cached_tokens)
        self.wish.read(leg.life)
        worker = self._desk.fleet.in_life(leg.life)
        if worker is not None:
            worker.computed((self.rid, leg.key), self._desk.now)
            worker.measured(message.handle.kv_tokens - message.cached_tokens, times.prefill_s)

    def first_row(self, leg: DecodeLeg, first: FirstRow) -> None:
        """Take what the decode worker measured of an attempt's first token."""
        self.wish.read(leg.life)
        times = first.durations
        if not leg.local:
            self.stages.stepped(times.queue_s, times.first_step_s)
            return
        self.stages.prefilled(times.queue_s, times.prefill_s)
        self.cached(first.cached_tokens)
        worker = self._desk.fleet.in_life(leg.life)
        if worker is not None:
            worker.computed((self.rid, leg.slot), self._desk.now)
            worker.measured(self.context - first.cached_tokens, times.prefill_s)

    def remember_prefix(self, life: Life) -> None:
        """This worker will have the prompt's blocks."""
        worker = self._desk.fleet.in_life(life)
        if worker is not None:
            self.wish.taken(worker)

    def exclude(self, worker: str, seconds: float) -> None:
        """Not to be asked for this request before."""
        self.wish.not_before[worker] = self._desk.now + seconds

    def note_refusal(self, life: Life, refused: Refused) -> None:
        """Refusals never count against a worker; it is only not asked again before `retry_ms`."""
        retry_s = max(LEAST_RETRY_S, refused.retry_ms / 1000)
        self.exclude(life[0], retry_s)
        self.count(f"refused_{refused.reason}")
        worker = self._desk.fleet.in_life(life)
        if refused.reason is RefuseReason.FULL and worker is not None:
            worker.full_until = self._desk.now + retry_s
        if refused.reason in FOR_GOOD:
            self.wish.never[life[0]] = refused.message
            if refused.reason in TOO_MUCH:
                self._too_much = TOO_MUCH[refused.reason](refused.message)

    def hopeless(self, reason: str) -> SplitserveError:
        """The error when waiting does not help."""
        return self._too_much or NoWorkers(reason)

    def count(self, what: str) -> None:
        if not is_probe(self.rid):
            self._desk.outbox.counts[what] += 1

    def timer(self, wait: Wait, seconds: float) -> None:
        self._desk.timer(self.rid, wait, seconds)

    def wait(self) -> None:
        """Look for a decode worker, from now on at most `queue_timeout`."""
        sub = self.submission
        if self._desk.queue.join(self.rid, sub.priority, self._came_at, len(sub.ids)):
            self.timer(Wait.AGE, self._desk.settings.queue_timeout)

    def waits_no_more(self) -> None:
        if self._desk.queue.part(self.rid):
            self._desk.no_timer(self.rid, Wait.AGE)

    def split(self, settings: RoutingSettings) -> Split:
        return Split(self.submission.split or settings.split)
