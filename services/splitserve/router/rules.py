"""Rules of the router that look like pedantry, each behind a switch, so that the simulator can show what each is for.

Without some of them an answer breaks, without others it only comes later or is computed twice: `tests/simulation/focuses`.

| rule | what goes wrong without it |
|---|---|
| `guard_da` | a late row, KvLoaded, KvFailed or Preempted of a lost decode attempt is taken for the current one's |
| `guard_pa` | a first token or handle of a given-up prefill is taken: two histories of one answer |
| `index_once` | a frame that came twice, or again by Resume, repeats its tokens to the client |
| `amend_new_number` | an amended job keeps its number: rows of the old content pass the guard |
| `fresh_slots` | a slot is used again: an old row or FinAck meets the wrong answer |
| `own_beat_rule` | a router whose own bus is sick declares every worker dead |
| `forward_kv_ready` | a KvReady lost to the decode worker leaves it waiting |
| `forward_after_digest` | … and so does a forward that is lost too |
| `resume_gaps` | a lost frame is noticed by nobody until the end |
| `resume_before_replacing` | a digest that crossed an acceptance costs a healthy worker its job |
| `digest_repairs` | the loss of a last frame, a Preempted or a job is noticed by nobody |
| `digest_cancels` | a lost Cancel or FinAck leaves work running that nobody wants |
| `cancel_unanswered` | a job whose answer was lost runs beside its successor |
| `same_numbers_after_outage` | a job that was taken just before an outage is done twice |
| `progress_timer` | a frozen prefill worker holds a request for ever |
| `pause_when_sick` | after an outage of our own, every prefill looks stuck |
| `renew_while_transferring` | the lease ends while a second decode worker is looked for |
| `queue_age` | a request that no worker takes waits until its deadline |
| `loss_budget` | a request that kills its workers kills all of them |
| `prefill_losses` | a request whose prefills fail never falls back to its decode worker |
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rules:
    """All on in production; the table above says what each is for."""

    guard_da: bool = True
    guard_pa: bool = True
    index_once: bool = True
    amend_new_number: bool = True
    fresh_slots: bool = True
    own_beat_rule: bool = True
    forward_kv_ready: bool = True
    forward_after_digest: bool = True
    resume_gaps: bool = True
    resume_before_replacing: bool = True
    digest_repairs: bool = True
    digest_cancels: bool = True
    cancel_unanswered: bool = True
    same_numbers_after_outage: bool = True
    progress_timer: bool = True
    pause_when_sick: bool = True
    renew_while_transferring: bool = True
    queue_age: bool = True
    loss_budget: bool = True
    prefill_losses: bool = True
