"""From a request's fields to what a worker samples by, with the model's own defaults. Pure but for the drawn seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from splitserve.errors import ContextTooLong, InvalidRequest
from splitserve.model.facts import ModelFacts
from splitserve.protocol.params import SamplingParams
from splitserve.router.openai.schema.fields import GenerationFields
from splitserve.router.openai.schema.messages import too_long
from splitserve.router.text import TextRules

_COOLEST = 0.01  # vLLM's least temperature that is not greedy; below, logits overflow
_SEEDS = 1 << 64

DrawSeed = Callable[[], int]
N = TypeVar("N", int, float)


def answer_tokens(prompt_tokens: int, wanted: int | None, facts: ModelFacts, *, field: str, default: int | None) -> int:
    """max_tokens of one prompt's answers: what was asked for, else `default`, else the rest of the context.

    Never over the model's own max_new_tokens. Raises ContextTooLong when prompt and answer do not fit.
    """
    room = facts.max_model_len - prompt_tokens
    if room < 1:
        raise too_long(prompt_tokens, facts.max_model_len)
    if wanted is not None and wanted > room:
        raise ContextTooLong(
            f"{field} is too large: this model's maximum context length is {facts.max_model_len} tokens, and you "
            f"asked for {prompt_tokens + wanted} ({prompt_tokens} in the prompt, {wanted} for the answer). "
            f"Shorten the prompt, or ask for {room} or fewer.",
            param=field,
        )
    return min(n for n in (room, wanted if wanted is not None else default, facts.defaults.max_tokens) if n is not None)


def sampling_params(
    request: GenerationFields, facts: ModelFacts, *, max_tokens: int, logprobs: int | None
) -> SamplingParams:
    """Raises InvalidRequest for fields that contradict each other or the model."""
    defaults = facts.defaults
    temperature = _first(request.temperature, defaults.temperature, 1.0)
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens is {min_tokens}, more than max_tokens, {max_tokens}", param="min_tokens")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=max(temperature, _COOLEST) if temperature > 0 else 0.0,
        top_p=_first(request.top_p, defaults.top_p, 1.0),
        top_k=min(max(_first(request.top_k, defaults.top_k, 0), 0), facts.vocab_size),
        min_p=_first(request.min_p, defaults.min_p, 0.0),
        presence_penalty=_first(request.presence_penalty, 0.0),
        frequency_penalty=_first(request.frequency_penalty, 0.0),
        repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty, 1.0),
        logit_bias=_logit_bias(request, facts),
        logprobs=logprobs,
        ignore_eos=bool(request.ignore_eos),
        min_tokens=min_tokens,
        stop_token_ids=tuple(sorted(stop_ids(request, facts))),
    )


def stop_ids(request: GenerationFields, facts: ModelFacts) -> frozenset[int]:
    """Ids that end an answer: the request's, and the model's ends unless it ignores them."""
    given = request.stop_token_ids or []
    _check_ids(given, "stop_token_ids", facts)
    return frozenset(given) | (frozenset() if request.ignore_eos else facts.eos_ids)


def text_rules(request: GenerationFields, facts: ModelFacts) -> TextRules:
    return TextRules(
        stops=tuple(request.stop or ()),
        include_stop=bool(request.include_stop_str_in_output),
        stop_ids=stop_ids(request, facts),
        skip_special_tokens=request.skip_special_tokens is not False,
        min_tokens=request.min_tokens or 0,
    )


def seeds(request: GenerationFields, draw: DrawSeed) -> tuple[int, ...]:
    """A seed an answer, unsigned 64 bits: the request's and the numbers after it, or drawn. -1 means none, as in vLLM."""
    n = request.n or 1
    if request.seed is None or request.seed == -1:
        return tuple(draw() for _ in range(n))
    return tuple((request.seed + i) % _SEEDS for i in range(n))


def _logit_bias(request: GenerationFields, facts: ModelFacts) -> tuple[tuple[int, float], ...]:
    bias = {int(id): float(value) for id, value in (request.logit_bias or {}).items()}
    _check_ids(bias, "logit_bias", facts)
    return tuple(sorted(bias.items()))


def _check_ids(ids: dict[int, float] | list[int], field: str, facts: ModelFacts) -> None:
    bad = next((id for id in ids if id >= facts.vocab_size), None)
    if bad is not None:
        raise InvalidRequest(f"{field}: {bad} is no token id, they end at {facts.vocab_size - 1}", param=field)


def _first(*values: N | None) -> N:
    """The first that is given; 0 is given. The last one always is."""
    return next(value for value in values if value is not None)
