"""One job of a decode worker: its state, its sequences, and the output that is kept until the router has it."""

from __future__ import annotations

from dataclasses import dataclass, field

from splitserve.decode.effects import Key
from splitserve.decode.intake import Intake
from splitserve.engine import door
from splitserve.protocol.messages import (
    Accepted,
    DecodeDurations,
    DecodeJob,
    DigestRow,
    FirstRow,
    KvReady,
    TokenRow,
)
from splitserve.protocol.params import TokenLogprob
from splitserve.protocol.states import DecodeState, FinishReason


@dataclass(slots=True)
class Sequence:
    """`outputs` begins with what was delivered before this attempt; `logprobs` with the attempt's own first token."""

    outputs: list[int]
    delivered: int
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    finish: FinishReason = FinishReason.RUNNING
    acked: bool = False  # the router needs no more of it
    first: FirstRow | None = None  # of the attempt's first row, if this sequence had it
    first_index: int = 0

    @property
    def live(self) -> bool:
        return self.finish is FinishReason.RUNNING and not self.acked

    def append(self, ids: tuple[int, ...], logprobs: tuple[TokenLogprob, ...], finish: FinishReason) -> None:
        self.outputs.extend(ids)
        self.logprobs.extend(logprobs)
        self.finish = finish


@dataclass(slots=True)
class Job:
    """One attempt. `asked` is the DecodeJob as the last Amend left it."""

    asked: DecodeJob
    answer: Accepted
    deadline: float
    sequences: list[Sequence]
    state: DecodeState
    in_engine: bool = True
    reserved: door.Reserved | None = None
    hashes: tuple[bytes, ...] = ()  # of the full blocks that are awaited: the proof of a handle
    intake: Intake = field(default_factory=Intake)
    ready: KvReady | None = None  # the final one
    ready_at: float = 0.0
    handle_s: float = 0.0  # KvReady received -> its fetch began
    renew: bool = True  # its owner knows the handle, as far as we know
    computed: int = 0  # tokens of the prompt, when computed here

    @property
    def key(self) -> Key:
        return (self.asked.rid, self.asked.da)

    @property
    def over(self) -> bool:
        """No sequence needs another token."""
        return not any(sequence.live for sequence in self.sequences)

    @property
    def tokens_left(self) -> int:
        """Prompt tokens that are still to be computed here."""
        local = self.asked.source is None and self.state is DecodeState.READY
        return len(self.asked.ids) - self.computed if local else 0

    def row(self) -> DigestRow:
        progress = tuple(len(sequence.outputs) for sequence in self.sequences)
        return DigestRow(self.asked.rid, self.asked.da, self.state, progress, self.asked.slot)

    def token_row(self, event: door.TokenEvent) -> TokenRow | None:
        """Take the engine's tokens in, each index once; None for a sequence that nobody wants any more."""
        sequence = self.sequences[event.sequence]
        if not sequence.live or event.first_index != len(sequence.outputs):
            return None
        sequence.append(event.ids, event.logprobs, event.finish)
        if event.queue_s is not None:
            durations = DecodeDurations(event.queue_s, event.prefill_s, event.first_step_s)
            sequence.first = FirstRow(0, event.cached_tokens, durations)
            sequence.first_index = event.first_index
        return TokenRow(
            self.asked.slot + event.sequence,
            self.asked.da,
            event.first_index,
            event.ids,
            event.finish,
            sequence.first if event.queue_s is not None else None,
            event.logprobs,
        )

    def rows_from(self, number: int, index: int) -> TokenRow | None:
        """What the router lacks of a sequence whose next index is `index`, from the list kept here."""
        sequence = self.sequences[number]
        ids = tuple(sequence.outputs[index:])
        if not ids and (sequence.finish is FinishReason.RUNNING or index > len(sequence.outputs)):
            return None
        first = sequence.first if index <= sequence.first_index else None
        known = max(0, index - sequence.delivered)  # those delivered before have their logprobs at the router
        logprobs = tuple(sequence.logprobs[known:]) if index >= sequence.delivered else ()
        return TokenRow(self.asked.slot + number, self.asked.da, index, ids, sequence.finish, first, logprobs)

    def ended_by(self, ready: KvReady) -> bool:
        """Whether every sequence that still lives ends with its first token."""
        if len(ready.first_ids) != len(self.sequences) or len(ready.finishes) != len(self.sequences):
            return False
        return all(
            not sequence.live or (len(sequence.outputs) == ready.index and finish != FinishReason.RUNNING)
            for sequence, finish in zip(self.sequences, ready.finishes, strict=True)
        )

    def take_first_tokens(self, ready: KvReady) -> tuple[int, ...]:
        """Append the first tokens where they come next; returns them, or nothing if every sequence had its own."""
        taken = False
        for number, sequence in enumerate(self.sequences):
            if sequence.live and len(sequence.outputs) == ready.index:
                finish = FinishReason(ready.finishes[number]) if ready.finishes else FinishReason.RUNNING
                sequence.append(ready.first_ids[number : number + 1], ready.logprobs[number : number + 1], finish)
                taken = True
        return ready.first_ids if taken else ()


def fresh_sequences(asked: DecodeJob) -> list[Sequence]:
    return [Sequence(list(ids), len(ids)) for ids in asked.outputs]


def promised_blocks(asked: DecodeJob, sequences: list[Sequence], block_tokens: int, promise_tokens: int) -> int:
    """Blocks that the live sequences need for the prompt and at least `promise_tokens` more (or all that may come).

    Full blocks of the prompt are shared by all of them.
    """
    shared = len(asked.ids) // block_tokens
    own = 0
    for sequence in sequences:
        if sequence.live:
            done = len(sequence.outputs)
            to_come = max(0, min(asked.params.max_tokens - done, promise_tokens))
            own += -(-(len(asked.ids) + done + to_come) // block_tokens) - shared
    return shared + own if own or any(s.live for s in sequences) else 0
