"""THE STORY of one request: from the queue through prefill, hand-over and decode to its one end (protocol §3).

Each public method is an event of the state table, with its guard: a message of an attempt that is not the current one
changes nothing. `da` and `pa` number attempts; a number names one content for ever, so whatever changes takes a new one.
What workers answer comes through `replies`, what is late through `patience`, what was lost through `digests`;
`delivery` and `endings` do what follows for the client, `courier` what follows for the workers.
"""

from __future__ import annotations

from splitserve.errors import (
    LossBudgetSpent,
    SplitserveError,
)
from splitserve.protocol.effects import NoAnswer
from splitserve.protocol.messages import KvFailed, KvLoaded, KvReady, Refused, TokenRow
from splitserve.protocol.states import FailReason, FinishReason, RequestState
from splitserve.router.account import Life, Worker
from splitserve.router.courier import Courier
from splitserve.router.delivery import Delivery
from splitserve.router.desk import Desk, Wait
from splitserve.router.endings import Endings
from splitserve.router.generation import Submission
from splitserve.router.legs import AMEND_TRIES, DecodeLeg, JobKind, PrefillLeg
from splitserve.router.placement import NotPlaced, Split
from splitserve.router.reading import Reading
from splitserve.router.request import LEAST_RETRY_S, Request

PROGRESS_S = 2.0
FORWARD_S = 0.3
ELSEWHERE_S = 2.0  # a prefill worker that failed this request is not asked again for it before
LOSS_BUDGET = 8  # of accepted decode workers
PREFILL_LOSSES = 3  # then decode reads the prompt itself

S = RequestState
_PREFILLING = S.PREFILLING  # asked for with each token: see `transcript`


class Lifecycle:
    """One live request and what happens to it. Its end takes it off the desk."""

    __slots__ = ("_courier", "_delivery", "_desk", "_endings", "_reading", "request")

    def __init__(self, submission: Submission, desk: Desk) -> None:
        self.request = Request(submission, desk)
        if submission.tokenise_s:
            self.request.stages.tokenised(submission.tokenise_s)
        self._desk = desk
        self._courier = Courier(submission, desk)
        self._endings = Endings(self.request, self._courier, desk)
        self._reading = Reading(self.request, self._courier, self._endings, desk)
        self._delivery = Delivery(self.request, self._endings, desk)
        self.request.timer(Wait.DEADLINE, submission.timeout_s)
        self.request.wait()
        self.request.save()

    # --- queued: find a decode worker ---

    def place(self) -> bool:
        """Ask a decode worker, the best first. False: none has room, so nobody behind is asked for either."""
        r, fleet = self.request, self._desk.fleet
        found = self._choose()
        if isinstance(found, NotPlaced):
            return not found.full
        worker = fleet.get(found[0])
        if worker is None:
            return True
        if r.prefill is None:
            r.pa += 1
            r.prefill = self._reading.plan(fleet.get(found[1]))
        r.da += 1
        r.transcript.forget_heard()
        source = r.prefill.source if r.prefill else None
        outputs = r.prefill.base if r.prefill else r.transcript.snapshot()
        r.decode = self._courier.ask_decode(worker, r.da, r.pa, source, outputs)
        load = self._desk.scout.decode_load(r.wish, r.context, worker, local=source is None)
        self._courier.promise_decode(r.decode, load)
        r.stages.asked(self._desk.now)
        return True

    def _choose(self) -> tuple[str, str] | NotPlaced:
        """Names of a decode and of a prefill worker, "" for none."""
        r = self.request
        if r.prefill is not None:  # its work goes on: only decode is looked for
            name = self._desk.scout.decode(r.wish, r.context, r.prefill.fingerprint, self._desk.now)
            return name if isinstance(name, NotPlaced) else (name, "")
        found = self._desk.scout.pair(r.wish, r.context, self._desk.now)
        if isinstance(found, NotPlaced):
            if found.for_good:
                self.fail(r.hopeless(found.reason))
            return found
        r.count(f"placed|{'split' if found.prefill else 'local'}|{found.why}")
        return found.decode, found.prefill or ""

    def decode_accepted(self, leg: DecodeLeg) -> None:
        """By its answer, or by anything that it could not say without having accepted."""
        r = self.request
        if leg.accepted:
            return
        leg.accepted = leg.held = True
        r.waits_no_more()
        r.decode_name = leg.life[0]
        r.stages.reserved(self._desk.now)
        r.remember_prefix(leg.life)
        for choice, end in enumerate(r.transcript.ends):
            if end is not None:
                self._desk.chores.fin_ack(leg.life, leg.slot + choice)
        if leg.local:
            r.to(S.PREFILLING)
        elif r.kv is not None:
            self._courier.forward(r.kv, leg)
        elif r.prefill is not None and r.prefill.job is None:
            self._reading.ask(r.prefill, leg)
        r.save()

    def decode_refused(self, leg: DecodeLeg, answer: Refused) -> None:
        if not leg.held:
            self.request.note_refusal(leg.life, answer)
        self.lose_decode(f"refused: {answer.reason}", cancel=False)

    def decode_silent(self, leg: DecodeLeg, why: NoAnswer) -> None:
        """Cancel this number and ask elsewhere under the next; an Amend is first tried again as it is."""
        if leg.tag.kind is JobKind.AMEND and leg.tries < AMEND_TRIES and why is NoAnswer.TIMEOUT:
            self._courier.ask_decode_again(leg)
            return
        self.request.exclude(leg.life[0], LEAST_RETRY_S)
        self.lose_decode("no answer", cancel=self._desk.rules.cancel_unanswered)

    # --- decode lost: another one, the prefill kept if there is one ---

    def lose_decode(self, cause: str, *, cancel: bool = True, counts: bool = True) -> None:
        """The decode worker is dead, gave it up, refused it or never answered."""
        r, leg = self.request, self.request.decode
        if leg is None:
            return
        self._courier.drop_decode(leg, cause, cancel=cancel)
        r.count(f"replaced|decode|{cause}")
        r.decode = None
        if leg.held:
            r.count("decode_lost")
            r.wish.moved = True
            r.losses += counts
            if r.losses > LOSS_BUDGET and self._desk.rules.loss_budget:
                self.fail(
                    LossBudgetSpent(f"{r.losses} decode workers were lost under this request, {LOSS_BUDGET} may be")
                )
                return
        if r.prefill is not None and r.prefill.job is None:
            self._endings.drop_prefill("not asked yet")
        if r.state is S.DECODING:
            r.to(S.PREFILLING)
        r.wait()

    def unknown_at(self, worker: Life, attempt: int) -> None:
        """This worker does not hold this attempt."""
        decode, prefill = self.request.decode, self.request.prefill
        if decode is not None and decode.accepted and decode.life == worker and decode.da == attempt:
            self.lose_decode("unknown there")
        elif prefill is not None and prefill.accepted and prefill.life == worker and prefill.pa == attempt:
            self.lose_prefill("unknown there")

    def preempted(self, worker: str, da: int) -> None:
        """Its pool ran dry: this one is asked last. No loss of the budget: nobody died."""
        leg = self.request.decode
        if leg is not None and leg.life[0] == worker and self.request.is_current(da):
            self.request.wish.last = worker
            self.request.preemptions += 1
            self.lose_decode("preempted", cancel=False, counts=False)

    # --- prefilling ---

    def prefill_accepted(self, leg: PrefillLeg) -> None:
        if leg.accepted:
            return
        leg.accepted = True
        self.request.remember_prefix(leg.life)
        self.prefill_progress()
        self.request.to(S.PREFILLING)

    def prefill_refused(self, leg: PrefillLeg, answer: Refused) -> None:
        self.request.note_refusal(leg.life, answer)
        self._replace_prefill(f"refused: {answer.reason}", lost=False)

    def prefill_progress(self) -> None:
        """It works: another 2 s for the next sign."""
        if self._desk.rules.progress_timer:
            self.request.timer(Wait.PROGRESS, PROGRESS_S)

    def lose_prefill(self, cause: str) -> None:
        """The prefill worker is dead, silent or stuck. Once the handle is out, its death is decode's to notice."""
        leg = self.request.prefill
        if leg is not None and self.request.kv is None:
            self.request.exclude(leg.life[0], ELSEWHERE_S)
            self._replace_prefill(cause, lost=True)

    def kv_failed(self, message: KvFailed) -> None:
        """Decode could not turn the handle into blocks."""
        r, leg, prefill = self.request, self.request.decode, self.request.prefill
        if leg is None or prefill is None or leg.life[0] != message.worker:
            return
        if not r.is_current(message.da) or message.pa != prefill.pa:
            return
        r.count(f"kv_failed_{message.reason}")
        self.decode_accepted(leg)
        if message.reason is not FailReason.FENCED:
            r.exclude(prefill.life[0], ELSEWHERE_S)
        self._replace_prefill(f"kv {message.reason}", lost=True)

    def _replace_prefill(self, cause: str, *, lost: bool) -> None:
        """pa+1 elsewhere and an Amend for the reservation; nobody, or too many lost: decode reads the prompt."""
        r, decode = self.request, self.request.decode
        r.count(f"replaced|prefill|{cause}")
        r.prefill_losses += lost
        r.wish.local = r.prefill_losses >= PREFILL_LOSSES and self._desk.rules.prefill_losses
        fingerprint = r.prefill.fingerprint if r.prefill else ""
        self._endings.drop_prefill(cause)
        if r.state is S.TRANSFERRING:
            r.to(S.PREFILLING)
        if decode is None:
            return  # it is looked for already, and gets a prefill of its own
        if not decode.held:
            self.lose_decode(cause)
            return
        reader = None
        if not r.wish.local:
            name = self._desk.scout.prefill(r.wish, r.context, fingerprint, self._desk.now)
            reader = self._desk.fleet.get(name) if name else None
        if reader is None and not lost and not r.wish.local and r.split(self._desk.settings) is Split.ALWAYS:
            self.lose_decode(cause, counts=False)  # back to the queue until a prefill worker has room
            return
        self._reading.again(reader, decode)

    def wait_no_longer(self, here: Worker, before: int, there: Worker) -> None:
        """It waits `here` behind so many prompt tokens, and `there` nothing is to be read."""
        self._reading.move(here, before, there)

    # --- transferring ---

    def kv_ready(self, message: KvReady) -> bool:
        """The first token, at once to the client. False: of a prefill that was given up; its handle is to be released."""
        r, leg = self.request, self.request.prefill
        if message.handle.pa != r.pa and self._desk.rules.guard_pa:
            return False
        if leg is None or leg.job is None or r.kv is not None or not message.final:
            return True
        self.prefill_accepted(leg)
        r.kv = message
        r.stages.prefill_told(self._desk.now, message.durations.queue_s + message.durations.prefill_s)
        r.prefilled(leg, message)
        self._desk.no_timer(r.rid, Wait.PROGRESS)
        r.to(S.TRANSFERRING)
        if self._desk.rules.renew_while_transferring:
            self._desk.chores.keep(message.handle)
        if self._desk.rules.forward_kv_ready:
            r.timer(Wait.FORWARD, FORWARD_S)
        for choice, token in enumerate(message.first_ids):
            if len(r.transcript.outputs[choice]) != message.index:
                continue  # n > 1, read again: a token and an end that are not those delivered
            finish = FinishReason(message.finishes[choice]) if message.finishes else FinishReason.RUNNING
            logprobs = message.logprobs[choice : choice + 1]
            self._delivery.take(choice, TokenRow(0, r.da, message.index, (token,), finish, None, logprobs))
        return True

    def forward(self) -> None:
        """Decode may not have the KvReady."""
        if self.request.kv is not None and self.request.decode is not None:
            self._courier.forward(self.request.kv, self.request.decode)

    def kv_loaded(self, message: KvLoaded) -> None:
        r, leg = self.request, self.request.decode
        if leg is None or leg.life[0] != message.worker or not r.is_current(message.da) or message.pa != r.pa:
            return
        self.decode_accepted(leg)
        r.stages.loaded(message.handle_s, message.transfer_s)
        self.loaded()

    def loaded(self) -> None:
        """Decode has the blocks; it releases the handle itself."""
        if self.request.prefill is not None:
            self._endings.drop_prefill("loaded", end=False)
            self.request.to(S.DECODING)

    # --- decoding ---

    def row(self, choice: int, row: TokenRow) -> None:
        r, leg = self.request, self.request.decode
        if leg is None or (leg.job.da != row.da and not r.is_current(row.da)):
            return
        if not leg.accepted:
            self.decode_accepted(leg)
        if r.prefill is not None:
            self.loaded()
        elif r.state is _PREFILLING:  # it has read the prompt itself
            r.to(S.DECODING)
        if row.first is not None:
            r.first_row(leg, row.first)
        if r.transcript.ends[choice] is not None:  # it did not hear that this answer is over
            self._desk.chores.fin_ack(leg.life, leg.slot + choice)
            return
        self._delivery.take(choice, row)
        if r.live and r.transcript.behind and self._desk.rules.resume_gaps:
            self._desk.chores.gap(leg.life, r.rid)

    def stop(self, choice: int) -> None:
        """A stop string was met."""
        self._delivery.stop(choice)

    # --- ends ---

    def leave(self, error: SplitserveError | None = None) -> None:
        """Nobody waits for it: the client is gone, or `error` ended what it was a part of."""
        if error is None:
            self._endings.leave()
        else:
            self.fail(error)

    def fail(self, error: SplitserveError) -> None:
        self._endings.fail(error)

    # --- outages (other waits: `patience`) ---

    def ask_again(self) -> None:
        """Our bus is back: what was not answered, again under the same numbers."""
        decode, prefill = self.request.decode, self.request.prefill
        if decode is not None and not decode.accepted:
            if self._desk.rules.same_numbers_after_outage:
                self._courier.ask_decode_again(decode)
            else:
                self.lose_decode("outage", cancel=False)
        if prefill is not None and prefill.job is not None and not prefill.accepted:
            self._courier.ask_prefill_again(prefill)
