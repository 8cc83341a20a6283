from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from splitserve.errors import TABLE
from splitserve.telemetry.families import Family, Kind, families

SPEC = json.loads((Path(__file__).parent / "vllm_0_32.json").read_text())
BOUNDED_BY_LENGTH = {
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "vllm:request_max_num_generation_tokens",
    "vllm:request_params_max_tokens",
    "vllm:request_prefill_kv_computed_tokens",
}
LENGTHS = {2048: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000], 131072: [m * 10**p for p in range(5) for m in (1, 2, 5)] + [100_000]}  # fmt: skip


def theirs(max_model_len: int) -> list[dict[str, Any]]:
    """What vLLM has at this length; it was read off at the shorter one."""
    return [
        {**row, "buckets": LENGTHS[max_model_len] if row["name"] in BOUNDED_BY_LENGTH else row["buckets"]}
        for row in SPEC["families"]
    ]


def shown(family: Family) -> dict[str, Any]:
    return {
        "name": family.name,
        "type": family.kind.value,
        "labels": sorted((*family.identity, *family.labels)),
        "buckets": list(family.buckets),
    }


def by_name(row: dict[str, Any]) -> str:
    return row["name"]


@pytest.mark.parametrize("max_model_len", LENGTHS)
def test_the_table_has_vllms_families_and_no_other_under_its_names(max_model_len: int) -> None:
    ours = [shown(family) for family in families(max_model_len) if not family.name.startswith("splitserve_")]
    assert sorted(ours, key=by_name) == sorted(theirs(max_model_len), key=by_name)


def test_the_lengths_tried_include_the_one_that_was_read_off() -> None:
    rows = {row["name"]: row["buckets"] for row in SPEC["families"]}
    assert all(rows[name] == LENGTHS[SPEC["max_model_len"]] for name in BOUNDED_BY_LENGTH)


def test_a_family_stands_in_the_table_once() -> None:
    names = [family.name for family in families(4096)]
    assert len(names) == len(set(names))


def test_histograms_have_buckets_and_nothing_else_has() -> None:
    for family in families(4096):
        assert bool(family.buckets) == (family.kind is Kind.HISTOGRAM), family.name


def test_series_known_beforehand_fit_the_labels_and_are_told_apart() -> None:
    for family in families(4096):
        values = [series.values for series in family.known]
        assert len(values) == len(set(values)), family.name
        assert all(len(one) == len(family.labels) for one in values), family.name


def test_a_series_is_constant_or_rare_or_neither() -> None:
    for family in families(4096):
        for series in family.known:
            assert not (series.constant and series.rare), (family.name, series)
            assert series.constant or not series.value, (family.name, series)


def test_codes_of_failed_requests_are_codes_of_the_api() -> None:
    codes = {row.code for row in TABLE}
    failed = next(family for family in families(4096) if family.name == "splitserve_requests_failed")
    assert {series.values[0] for series in failed.known} <= codes
