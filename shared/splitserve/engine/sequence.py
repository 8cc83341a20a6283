"""All state of a job and its sequences. Derived values are properties; who may change what stands in `Phase`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from splitserve.engine.batch import SampleRow
from splitserve.engine.door import Add, Key, Mode
from splitserve.protocol.params import SamplingParams
from splitserve.protocol.states import FinishReason


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What one engine may do. Tokens and sequences, not bytes."""

    block_tokens: int
    max_num_seqs: int  # sequences in one batch
    chunk_tokens: int  # prompt tokens computed in a step, beside the decodes
    max_model_len: int  # prompt + output
    eos_ids: frozenset[int]  # all of the generation config's
    fingerprint: str = ""  # seed of the prefix hashes
    prefix_caching: bool = True
    lone_chunk_tokens: int = 0  # prompt tokens in a step without decodes, where that is more
    tokens_a_decode: int = 0  # by which each decode makes the chunk smaller, to a quarter at least


class Phase(Enum):
    """Where a job stands, and so which queue of the scheduler has it."""

    WAITING = "waiting"  # its prompt is to be computed here; no blocks yet
    COMPUTING = "computing"  # chunks of its prompt are in the batch
    AWAITING = "awaiting"  # blocks reserved, KV on its way from elsewhere
    LOADED = "loaded"  # KV is there, no seat in the batch yet
    RUNNING = "running"  # its sequences decode
    HELD = "held"  # prompt computed, blocks kept for others to read
    GONE = "gone"  # on no queue: it has left, or is between two


@dataclass(eq=False, slots=True)
class Span:
    """Ids and the blocks that hold their KV: the prompt that a job's sequences share, then each sequence by itself."""

    ids: list[int]
    tables: list[list[int]] = field(default_factory=lambda: [[]])  # [group][block], grown in place
    computed: int = 0  # positions [0, computed) are in the blocks
    hashes: list[bytes] = field(default_factory=list[bytes])  # of the first full blocks

    @property
    def left(self) -> int:
        """Ids to feed before the next token can be sampled; 1 = a decode step."""
        return len(self.ids) - self.computed


@dataclass(eq=False, slots=True)
class Sequence:
    """One answer of a job. `span` is the job's own prompt span while, or as long as, nobody else shares it."""

    job: Job
    number: int
    seed: int
    span: Span
    finish: FinishReason = FinishReason.RUNNING
    aborted: bool = False
    reported: bool = False  # the attempt's first event was sent

    @property
    def live(self) -> bool:
        return self.finish is FinishReason.RUNNING and not self.aborted

    @property
    def num_outputs(self) -> int:
        return len(self.span.ids) - self.job.prompt_len

    def sample_row(self) -> SampleRow:
        job, ids = self.job, self.span.ids
        return SampleRow(job.params, self.seed, len(ids) - job.prompt_len, job.prompt_len, ids)


@dataclass(eq=False, slots=True)
class Job:
    """A sequence group: n sequences over one prompt."""

    key: Key
    mode: Mode
    params: SamplingParams
    prompt_len: int
    rank: tuple[int, int]  # (priority, arrival): lower goes first, the highest gives way first
    hash_seed: bytes
    stop_ids: frozenset[int]
    prompt: Span  # what is computed or awaited for all of its sequences at once
    ready_at: float  # could have been scheduled: added, or loaded
    counted: bool = True
    sequences: list[Sequence] = field(default_factory=list[Sequence])
    phase: Phase = Phase.WAITING
    uncached: int = 0  # ids of `prompt` that are still to be computed here
    cached_tokens: int = 0
    told_blocks: int = 0  # of a PREFILL job: those that others may read already
    started: bool = False
    started_at: float = 0.0  # first scheduled, once `started`

    @property
    def live(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if sequence.live]

    def start(self, now: float) -> bool:
        """It is scheduled; whether for the first time."""
        first, self.started = not self.started, True
        if first:
            self.started_at = now
        return first

    @property
    def seats(self) -> int:
        """Rows that it may need in one batch."""
        return 1 if self.mode is Mode.PREFILL else len(self.sequences)


def make_job(add: Add, rank: tuple[int, int], hash_seed: bytes, eos_ids: frozenset[int], now: float) -> Job:
    """The job of an `Add`, without blocks.

    n = 1: prompt and outputs are one span. n > 1: the prompt is, and each sequence gets its own with its outputs behind.
    """
    fulls = [[*add.ids[: add.prompt_len], *output] for output in add.outputs]
    single = len(fulls) == 1
    prompt = Span(fulls[0] if single and add.mode is Mode.LOCAL else list(add.ids))
    stop_ids = frozenset(add.params.stop_token_ids) | (frozenset() if add.params.ignore_eos else eos_ids)
    job = Job(add.key, add.mode, add.params, add.prompt_len, rank, hash_seed, stop_ids, prompt, now, add.counted)
    for number, (seed, full) in enumerate(zip(add.seeds, fulls, strict=True)):
        shared = add.mode is Mode.PREFILL or (single and len(full) <= len(prompt.ids))
        job.sequences.append(Sequence(job, number, seed, prompt if shared else Span(full)))
    return job


def finish_reason(
    token: int, num_outputs: int, total: int, params: SamplingParams, stop_ids: frozenset[int], max_model_len: int
) -> FinishReason:
    """Whether a sequence ends with `token`, its last of `num_outputs` (this one counted) and `total` ids."""
    if token in stop_ids and num_outputs >= params.min_tokens:
        return FinishReason.STOP
    if num_outputs >= params.max_tokens or total >= max_model_len:
        return FinishReason.LENGTH
    return FinishReason.RUNNING


def blocks_for(tokens: int, block_tokens: int) -> int:
    """Blocks that so many tokens fill, the last one perhaps in part."""
    return -(-tokens // block_tokens)


def blocks_at_least(job: Job, block_tokens: int) -> int:
    """Blocks without which a job cannot produce a token: whole prompt blocks are shared by its sequences."""
    prompt = blocks_for(len(job.prompt.ids), block_tokens)
    if job.seats == 1:
        return prompt
    whole = job.prompt_len // block_tokens
    own = sum(blocks_for(len(sequence.span.ids), block_tokens) - whole for sequence in job.sequences)
    return max(prompt, whole + own)


def cannot_serve(job: Job, total_blocks: int, config: EngineConfig) -> str:
    """Why an engine, even an idle one, can never serve a job; "" when it can."""
    length = max(len(job.prompt.ids), *(len(sequence.span.ids) for sequence in job.sequences))
    if length > config.max_model_len:
        return f"{length} tokens are over this model's {config.max_model_len}"
    if job.seats > config.max_num_seqs:
        return f"{job.seats} sequences are more than the {config.max_num_seqs} of a batch (--max-num-seqs)"
    need = blocks_at_least(job, config.block_tokens)
    if need > total_blocks:
        return f"{length} tokens in {len(job.sequences)} sequences need {need} KV blocks; the pool has {total_blocks}"
    return ""
