"""Sampling parameters as they travel from router to worker."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What the next token is a function of, beside seed, ids so far and index. Stop *strings* stay at the router.

    Ranges are checked at the router (`router/openai`); a worker trusts them.
    """

    max_tokens: int  # >= 1
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # 0 = all
    min_p: float = 0.0  # [0, 1]
    presence_penalty: float = 0.0  # [-2, 2], over output ids
    frequency_penalty: float = 0.0  # [-2, 2], over output ids
    repetition_penalty: float = 1.0  # > 0, over prompt and output ids
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None  # None: none; k >= 0: the chosen token's and the k best, of raw logits
    ignore_eos: bool = False
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a sampled token under the raw logits, its rank (1 = best), and the best alternatives."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()  # (id, logprob), best first
