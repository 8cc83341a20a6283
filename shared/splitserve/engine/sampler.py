"""From logits to tokens. A token is a pure function of (logits, parameters, seed, ids so far, index), whatever the batch.

Order, as in vLLM: logit bias, penalties, the ban of early stops, temperature, min_p, top_k, top_p. The filters reduce to one
number a row, the least logit that is kept (ties all stay), so candidates remain in vocabulary order; the token is where the
row's uniform number falls in their cumulative distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from splitserve.engine.batch import SampleRow
from splitserve.engine.philox import uniforms
from splitserve.protocol.params import SamplingParams, TokenLogprob

_FIRST_WIDTH = 256  # top_p looks at this many of the best logits first, and at eight times more while that is too few
_PIECE = 256  # weights that are summed up together
_LEAST_TEMPERATURE = 1e-6  # below it logits would overflow; what it draws is the best token already


class Sampler:
    """`eos_ids` are banned before `min_tokens`, as are a request's own stop ids."""

    def __init__(self, eos_ids: Sequence[int], vocab_size: int) -> None:
        self._eos_ids = tuple(eos_ids)
        self._vocab_size = vocab_size

    def __call__(
        self, logits: torch.Tensor, rows: Sequence[SampleRow]
    ) -> tuple[tuple[int, ...], tuple[TokenLogprob | None, ...]]:
        """`logits [N, V]` of any float dtype, one row a sample; gives N ids, and log-probabilities where asked for."""
        if not rows:
            return (), ()
        raw = logits[:, : self._vocab_size].float()
        adjusted = self._adjust(raw, rows)
        drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
        if len(drawn) == len(rows):
            ids = _draw(adjusted, rows)
        else:
            ids = adjusted.argmax(-1)
            if drawn:
                ids[drawn] = _draw(adjusted[drawn], [rows[i] for i in drawn])
        return tuple(ids.tolist()), _logprobs(raw, ids, rows)

    def _adjust(self, raw: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
        """Logits after bias, penalties and bans; `raw` itself when no row asks for any."""
        changed = [(i, row) for i, row in enumerate(rows) if self._changes_logits(row)]
        if not changed:
            return raw
        adjusted = raw.clone()
        for i, row in changed:
            self._adjust_row(adjusted[i], row)
        return adjusted

    def _changes_logits(self, row: SampleRow) -> bool:
        p = row.params
        return bool(p.logit_bias) or _has_penalty(p) or row.index < p.min_tokens

    def _adjust_row(self, logits: torch.Tensor, row: SampleRow) -> None:
        p = row.params
        if p.logit_bias:
            bias = [(i, value) for i, value in p.logit_bias if 0 <= i < logits.shape[0]]
            values = torch.tensor([value for _, value in bias], device=logits.device)
            logits.index_add_(0, _ids([i for i, _ in bias], logits), values)
        if _has_penalty(p):
            _penalise(logits, row)
        if row.index < p.min_tokens:
            banned = (*p.stop_token_ids, *(() if p.ignore_eos else self._eos_ids))
            logits[_ids([i for i in banned if 0 <= i < logits.shape[0]], logits)] = float("-inf")


def _has_penalty(p: SamplingParams) -> bool:
    return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0


def _ids(ids: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=like.device)


def _penalise(logits: torch.Tensor, row: SampleRow) -> None:
    """Repetition over prompt and output, presence and frequency over the output, in place."""
    p = row.params
    seen = np.asarray(row.ids, dtype=np.int64)
    if p.repetition_penalty != 1.0:
        ids = torch.from_numpy(np.unique(seen)).to(logits.device)
        values = logits[ids]
        logits[ids] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    output, counts = np.unique(seen[row.prompt_len :], return_counts=True)
    if len(output) and (p.presence_penalty or p.frequency_penalty):
        penalty = torch.from_numpy(counts).float() * p.frequency_penalty + p.presence_penalty
        logits.index_add_(0, torch.from_numpy(output).to(logits.device), -penalty.to(logits.device))


def _draw(logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """Ids `[N]` drawn from the filtered distribution of each row."""
    temperature = torch.tensor([max(row.params.temperature, _LEAST_TEMPERATURE) for row in rows], device=logits.device)
    scaled = logits / temperature[:, None]
    weights = scaled.sub_(scaled.amax(-1, keepdim=True)).exp_()
    cutoff = _cutoffs(weights, rows)
    if cutoff is not None:
        weights = weights * (weights >= cutoff[:, None])
    uniform = torch.from_numpy(uniforms([row.seed for row in rows], [row.index for row in rows])).to(logits.device)
    return _at_share(weights, uniform)


def _at_share(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Ids `[N]` at which the sum so far of `weights [N, V]` passes `uniform [N]` of the whole; never one without weight.

    In float64, by sums of pieces and then within one: a running sum of a row of 49,152 took three quarters of sampling on a CPU.
    """
    rows, vocabulary = weights.shape
    padded = functional.pad(weights, (0, -vocabulary % _PIECE)) if vocabulary % _PIECE else weights
    pieces = padded.view(rows, -1, _PIECE)
    ends = functional.pad(pieces.sum(-1, dtype=torch.float64).cumsum(-1), (1, 0))
    target = _below(uniform[:, None] * ends[:, -1:], ends[:, -1:])
    piece = torch.searchsorted(ends, target, right=True) - 1
    within = pieces[torch.arange(rows, device=weights.device), piece[:, 0]].cumsum(-1, dtype=torch.float64)
    rest = _below(target - ends.gather(1, piece), within[:, -1:])
    return (piece * _PIECE + torch.searchsorted(within, rest, right=True))[:, 0]


def _below(x: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    return torch.minimum(x, torch.nextafter(limit, torch.zeros_like(limit)))


def _cutoffs(weights: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor | None:
    """The least weight that each row keeps, `[N]`; weights are relative to the best, which is 1. None: all keep all."""
    params = [row.params for row in rows]
    vocabulary = weights.shape[-1]
    min_p = [p.min_p for p in params]
    top_k = [p.top_k if 0 < p.top_k < vocabulary else 0 for p in params]
    cutoff = torch.tensor(min_p, device=weights.device) if any(min_p) else None
    if any(top_k):
        best = weights.topk(max(top_k), sorted=True).values
        kth = best.gather(1, torch.tensor(top_k, device=weights.device).clamp(min=1)[:, None] - 1)[:, 0]
        kth = torch.where(torch.tensor(top_k, device=weights.device) > 0, kth, 0.0)
        cutoff = kth if cutoff is None else torch.maximum(cutoff, kth)
    nucleus = [i for i, p in enumerate(params) if p.top_p < 1.0]
    if nucleus:
        cutoff = weights.new_zeros(len(rows)) if cutoff is None else cutoff
        top_p = torch.tensor([params[i].top_p for i in nucleus], dtype=torch.float64, device=weights.device)
        cutoff[nucleus] = _nucleus(weights[nucleus], cutoff[nucleus], top_p)
    return cutoff


def _nucleus(weights: torch.Tensor, cutoff: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The least weight of the smallest set of best candidates whose share reaches `top_p [N]`, of those above `cutoff`."""
    kept = weights * (weights >= cutoff[:, None])
    wanted = (top_p * kept.sum(-1, dtype=torch.float64))[:, None]
    vocabulary, width = weights.shape[-1], _FIRST_WIDTH
    while True:
        best = kept.topk(min(width, vocabulary), sorted=True).values
        share = best.cumsum(-1, dtype=torch.float64)
        if width >= vocabulary or bool((share[:, -1:] >= wanted).all()):
            break
        width *= 8
    last = torch.searchsorted(share, wanted).clamp_(max=best.shape[-1] - 1)
    return torch.maximum(best.gather(1, last)[:, 0], cutoff)


def _logprobs(raw: torch.Tensor, ids: torch.Tensor, rows: Sequence[SampleRow]) -> tuple[TokenLogprob | None, ...]:
    """Of the raw logits, before bias, penalties and temperature."""
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    answers: list[TokenLogprob | None] = [None] * len(rows)
    if not asked:
        return tuple(answers)
    counts = [rows[i].params.logprobs or 0 for i in asked]
    logprobs = torch.log_softmax(raw[asked], -1)
    chosen = logprobs.gather(1, ids[asked][:, None])
    ranks = (logprobs > chosen).sum(-1) + 1
    best = logprobs.topk(min(max(counts), raw.shape[-1]), sorted=True)
    top = zip(best.indices.tolist(), best.values.tolist())
    for i, count, logprob, rank, (top_ids, top_values) in zip(
        asked, counts, chosen[:, 0].tolist(), ranks.tolist(), top, strict=True
    ):
        answers[i] = TokenLogprob(logprob, rank, tuple(zip(top_ids[:count], top_values[:count])))
    return tuple(answers)
