"""A token is a pure function of logits, parameters, seed, ids and index, drawn from the exact distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitserve.engine.batch import SampleRow
from splitserve.engine.philox import philox, uniforms
from splitserve.engine.sampler import Sampler
from splitserve.protocol.params import SamplingParams

VOCABULARY = 12
EOS = 3
SAMPLER = Sampler([EOS], VOCABULARY)
LOGITS = torch.tensor([1.5, -0.3, 0.7, 2.0, -1.0, 0.0, 1.1, 0.2, -2.5, 0.9, 1.5, -0.7])
DRAWS = 20_000


def _row(
    seed: int = 0, index: int = 0, ids: tuple[int, ...] = (0, 5, 6), prompt_len: int = 1, **params: Any
) -> SampleRow:
    given: dict[str, Any] = {"max_tokens": 50, **params}
    return SampleRow(SamplingParams(**given), seed, index, prompt_len, ids)


def _sample(rows: list[SampleRow], logits: torch.Tensor = LOGITS) -> list[int]:
    return list(SAMPLER(logits.expand(len(rows), -1).clone(), rows)[0])


def _kept(probabilities: np.ndarray, keep: np.ndarray) -> np.ndarray:
    return np.where(keep, probabilities, 0.0) / probabilities[keep].sum()


def _softmax(temperature: float = 1.0, logits: torch.Tensor = LOGITS) -> np.ndarray:
    return torch.softmax(logits.double() / temperature, -1).numpy()


def _top_p(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """The smallest set of best candidates whose share reaches top_p; ties all stay."""
    best = np.sort(probabilities)[::-1]
    least = best[np.searchsorted(np.cumsum(best), top_p)]
    return _kept(probabilities, probabilities >= least * (1 - 1e-9))


def _biased() -> torch.Tensor:
    return LOGITS.index_add(0, torch.tensor([4, 0]), torch.tensor([3.0, -1.0]))


def _penalised() -> torch.Tensor:
    """ids (0, 5, 6, 6), prompt 1: repetition over 0, 5, 6; presence and frequency over 5 (once) and 6 (twice)."""
    logits = LOGITS.clone()
    for i in (0, 5, 6):
        logits[i] = logits[i] / 1.3 if logits[i] > 0 else logits[i] * 1.3
    logits[5] -= 0.4 + 0.25
    logits[6] -= 0.4 + 0.25 * 2
    return logits


CASES: dict[str, tuple[dict[str, Any], Callable[[], np.ndarray]]] = {
    "plain": ({}, _softmax),
    "cold": ({"temperature": 0.5}, lambda: _softmax(0.5)),
    "hot": ({"temperature": 1.8}, lambda: _softmax(1.8)),
    "top_k": ({"top_k": 4}, lambda: _kept(_softmax(), np.isin(np.arange(VOCABULARY), [0, 3, 6, 10]))),
    "top_k at a tie": ({"top_k": 2}, lambda: _kept(_softmax(), np.isin(np.arange(VOCABULARY), [0, 3, 10]))),
    "top_k above the vocabulary": ({"top_k": 500}, _softmax),
    "top_p": ({"top_p": 0.7}, lambda: _top_p(_softmax(), 0.7)),
    "top_p tiny": ({"top_p": 0.001}, lambda: np.eye(VOCABULARY)[3]),
    "min_p": ({"min_p": 0.3}, lambda: _kept(_softmax(), _softmax() >= 0.3 * _softmax().max())),
    "top_k then top_p": (
        {"top_k": 6, "top_p": 0.8},
        lambda: _top_p(_kept(_softmax(), _softmax() >= np.sort(_softmax())[-6] * (1 - 1e-9)), 0.8),
    ),
    "cold, min_p then top_p": (
        {"temperature": 0.7, "min_p": 0.1, "top_p": 0.9},
        lambda: _top_p(_kept(_softmax(0.7), _softmax(0.7) >= 0.1 * _softmax(0.7).max()), 0.9),
    ),
    "logit_bias": ({"logit_bias": ((4, 3.0), (0, -1.0), (999, 5.0))}, lambda: _softmax(logits=_biased())),
    "penalties": (
        {"ids": (0, 5, 6, 6), "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.25},
        lambda: _softmax(logits=_penalised()),
    ),
    "min_tokens": (
        {"min_tokens": 60_000, "stop_token_ids": (10, 999)},
        lambda: _kept(_softmax(), ~np.isin(np.arange(VOCABULARY), [EOS, 10])),
    ),
    "min_tokens with ignore_eos": (
        {"min_tokens": 60_000, "stop_token_ids": (10,), "ignore_eos": True},
        lambda: _kept(_softmax(), np.arange(VOCABULARY) != 10),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_drawn_from_the_exact_distribution(name: str) -> None:
    """Chi-square at fixed seeds and indices, with a bound that one honest sampler in a thousand would miss."""
    params, exact = CASES[name]
    rows = [_row(seed=i, index=i % 5, **params) for i in range(DRAWS)]
    counts = np.bincount(_sample(rows), minlength=VOCABULARY)
    expected = exact() * DRAWS
    assert counts[expected == 0].sum() == 0
    some = expected > 0
    chi_square = ((counts[some] - expected[some]) ** 2 / expected[some]).sum()
    freedom = int(some.sum()) - 1
    assert chi_square <= freedom + 3.1 * math.sqrt(2 * freedom) + 5


mixed = st.builds(
    _row,
    seed=st.integers(-(2**63), 2**64),
    index=st.integers(0, 40),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.9, 0.4]),
    top_k=st.sampled_from([0, 1, 3, 40]),
    min_p=st.sampled_from([0.0, 0.2]),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    min_tokens=st.sampled_from([0, 20]),
    logprobs=st.sampled_from([None, 0, 3]),
)


@given(st.lists(mixed, min_size=1, max_size=6), st.integers(0, 1000))
def test_a_row_draws_the_same_token_whatever_else_is_in_the_batch(rows: list[SampleRow], seed: int) -> None:
    logits = torch.randn(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(seed))
    ids, logprobs = SAMPLER(logits, rows)
    for i, row in enumerate(rows):
        alone = SAMPLER(logits[i : i + 1], [row])
        assert alone[0][0] == ids[i]
        assert (alone[1][0] is None) == (logprobs[i] is None)


def test_a_large_vocabulary_draws_the_same_in_any_batch_however_wide_top_p_looks() -> None:
    sampler = Sampler([], 50_000)
    logits = torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0)) * 0.5
    rows = [_row(seed=5, index=i, top_p=p) for i, p in enumerate((0.999, 0.1, 0.01, 0.6))]
    together = sampler(logits, rows)[0]
    assert together == tuple(sampler(logits[i : i + 1], [row])[0][0] for i, row in enumerate(rows))


@pytest.mark.parametrize("kept", [1.0, 0.01])
def test_a_token_of_a_vocabulary_of_many_pieces_is_where_the_running_sum_passes_the_uniform_number(kept: float) -> None:
    size, rows = 1_000, [_row(seed=seed, index=seed % 7) for seed in range(200)]
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(len(rows), size, generator=random)
    logits[torch.rand(logits.shape, generator=random) > kept] = float("-inf")
    logits[:, -1] = 0.0  # one at least, and in the last piece, which is not whole
    running = torch.softmax(logits.double(), -1).cumsum(-1)
    uniform = torch.from_numpy(uniforms([row.seed for row in rows], [row.index for row in rows]))
    expected = torch.searchsorted(running, uniform[:, None] * running[:, -1:], right=True)[:, 0]
    assert Sampler([], size)(logits, rows)[0] == tuple(expected.tolist())


def test_greedy_takes_the_best_token_and_spends_no_randomness() -> None:
    assert _sample([_row(seed=seed, temperature=0.0) for seed in range(20)]) == [3] * 20


def test_greedy_obeys_bias_penalties_and_the_ban_of_early_stops() -> None:
    rows = [
        _row(temperature=0.0, logit_bias=((8, 100.0),)),
        _row(temperature=0.0, ids=(0, 3), frequency_penalty=1.0),
        _row(temperature=0.0, min_tokens=1),
        _row(temperature=0.0, min_tokens=1, index=1),
    ]
    assert _sample(rows) == [8, 0, 0, 3]


def test_repetition_counts_the_prompt_and_presence_does_not() -> None:
    rows = [
        _row(temperature=0.0, ids=(3,), repetition_penalty=2.0),
        _row(temperature=0.0, ids=(3,), presence_penalty=2.0),
    ]
    assert _sample(rows) == [0, 3]


def test_a_temperature_near_zero_is_greedy_and_finite() -> None:
    assert _sample([_row(seed=seed, temperature=1e-30) for seed in range(5)], LOGITS * 100) == [3] * 5


def test_logprobs_are_of_the_raw_logits_with_rank_and_the_best() -> None:
    rows = [
        _row(temperature=0.0, logprobs=2, logit_bias=((6, 100.0),)),
        _row(temperature=0.0),
        _row(seed=4, temperature=2.0, logprobs=0),
    ]
    ids, logprobs = SAMPLER(LOGITS.expand(3, -1).clone(), rows)
    exact = torch.log_softmax(LOGITS.double(), -1)
    first, second, third = logprobs
    assert first is not None
    assert ids[0] == 6
    assert (first.logprob, first.rank) == (pytest.approx(exact[6].item(), abs=1e-5), 4)
    assert [i for i, _ in first.top] in ([3, 0], [3, 10])
    assert first.top[0][1] == pytest.approx(exact[3].item(), abs=1e-5)
    assert second is None
    assert third is not None
    assert (third.logprob, third.top) == (pytest.approx(exact[ids[2]].item(), abs=1e-5), ())


def test_more_logprobs_than_tokens_gives_all_tokens() -> None:
    answer = SAMPLER(LOGITS[None].clone(), [_row(logprobs=20)])[1][0]
    assert answer is not None
    assert sorted(i for i, _ in answer.top) == list(range(VOCABULARY))


def test_columns_that_pad_the_vocabulary_are_never_sampled() -> None:
    padded = torch.cat([LOGITS, torch.full((4,), 50.0)])
    assert _sample([_row(temperature=0.0), _row(seed=1)], padded)[0] == 3
    assert max(_sample([_row(seed=seed) for seed in range(200)], padded)) < VOCABULARY


def test_logits_in_sixteen_bits_are_sampled_in_float32() -> None:
    assert _sample([_row(temperature=0.0)], LOGITS.bfloat16()) == [3]


def test_no_rows_give_no_tokens() -> None:
    assert SAMPLER(torch.empty(0, VOCABULARY), []) == ((), ())


def _words(*values: int) -> tuple[Any, ...]:
    return tuple(np.array([value], dtype=np.uint64) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_words_of_its_authors_test_vectors(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    words = philox(_words(*counter), _words(*key))
    assert tuple(int(word[0]) for word in words) == expected


def test_uniform_numbers_are_even_and_depend_on_seed_and_index_alone() -> None:
    many = uniforms([9] * 50_000, range(50_000))
    assert ((many >= 0) & (many < 1)).all()
    counts = np.histogram(many, bins=50, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 49 + 5 * math.sqrt(98)
    assert uniforms([9, 8], [123, 123])[0] == many[123]
    assert uniforms([8], [123])[0] != many[123]
    assert uniforms([-1], [0])[0] == uniforms([2**64 - 1], [0])[0]
