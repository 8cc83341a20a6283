"""**The sampler.** A token is a pure function of (logits, parameters, seed, the ids so far, index). It has no state that
would have to travel: when an answer moves to another worker, index 17 is drawn there as it would have been drawn here.
"""

from __future__ import annotations

from collections import Counter

import torch

from splitserve.engine.batch import SampleRow
from splitserve.engine.philox import uniforms
from splitserve.engine.sampler import Sampler
from splitserve.protocol.params import SamplingParams

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0])
sample = Sampler(eos_ids=(3,), vocab_size=4)


def row(index: int = 0, seed: int = 1, ids: tuple[int, ...] = (), **fields: float) -> SampleRow:
    return SampleRow(SamplingParams(max_tokens=100, **fields), seed, index, 0, ids)  # pyright: ignore[reportArgumentType]


def drawn(*rows: SampleRow) -> tuple[int, ...]:
    return sample(LOGITS.repeat(len(rows), 1), rows)[0]


def test_chance_is_a_function_of_seed_and_index() -> None:
    assert uniforms([7], [17]) == uniforms([7], [17])
    assert uniforms([7], [17]) != uniforms([7], [18])
    assert uniforms([7], [17]) != uniforms([8], [17])


def test_a_token_does_not_depend_on_who_else_is_in_the_batch() -> None:
    alone = [drawn(row(index))[0] for index in range(20)]
    together = drawn(*(row(index) for index in range(20)))
    assert tuple(alone) == together
    assert len(set(together)) > 1


def test_temperature_zero_takes_the_best_token() -> None:
    assert drawn(row(temperature=0.0)) == (0,)


def test_top_k_and_top_p_leave_only_the_likeliest() -> None:
    rows = 200
    assert set(drawn(*(row(index, top_k=2) for index in range(rows)))) == {0, 1}
    assert set(drawn(*(row(index, top_p=0.5) for index in range(rows)))) == {0}


def test_a_penalty_is_computed_from_the_ids_and_so_needs_no_memory() -> None:
    assert drawn(row(temperature=0.0, ids=(0, 0), frequency_penalty=1.0)) == (1,)


def test_over_many_indices_tokens_come_as_often_as_the_model_says() -> None:
    draws = 4000
    counted = Counter(drawn(*(row(index) for index in range(draws))))
    for token, share in enumerate(torch.softmax(LOGITS, 0).tolist()):
        assert abs(counted[token] / draws - share) < 0.03
