from __future__ import annotations

import json
from pathlib import Path

import pytest

from splitserve.errors import NotEnoughMemory
from splitserve.serve.cores import GIB, MIB, CoreShare, cores, free_memory, share_cores, share_memory, weight_bytes

NO_LIMIT = float("inf")


def test_workers_get_disjoint_cores_where_they_suffice() -> None:
    assert share_cores((0, 1), NO_LIMIT, 2) == [CoreShare(1, (0,)), CoreShare(1, (1,))]
    assert share_cores((0, 2, 4, 6, 8), NO_LIMIT, 2) == [CoreShare(2, (0, 2)), CoreShare(2, (4, 6))]


def test_more_workers_than_cores_run_anywhere_with_one_thread_each() -> None:
    assert share_cores((0, 1), NO_LIMIT, 4) == [CoreShare(1)] * 4


def test_a_quota_below_the_cores_sets_threads_and_pins_nothing() -> None:
    assert share_cores(tuple(range(64)), 4.0, 2) == [CoreShare(2)] * 2
    assert share_cores((0, 1), 0.5, 1) == [CoreShare(1)]


def test_threads_that_were_asked_for_are_given() -> None:
    assert share_cores((0, 1, 2, 3), NO_LIMIT, 2, threads=1) == [CoreShare(1, (0,)), CoreShare(1, (1,))]
    assert share_cores((0, 1), NO_LIMIT, 2, threads=2) == [CoreShare(2)] * 2


def test_the_pool_is_1_gib_or_a_part_of_a_quarter_of_what_is_free() -> None:
    assert share_memory(64 * GIB, GIB, workers=2).pool == GIB
    assert share_memory(4 * GIB, 256 * MIB, workers=2).pool == GIB // 2
    assert share_memory(64 * GIB, GIB, workers=2, pool=3 * GIB).pool == 3 * GIB


def test_too_little_memory_is_refused_with_both_numbers_and_a_way_out() -> None:
    with pytest.raises(NotEnoughMemory, match=r"2 workers need about \d+\.\d GiB.*2\.0 GiB are free: --prefill 0"):
        share_memory(2 * GIB, 2 * GIB, workers=2)
    with pytest.raises(NotEnoughMemory, match="a smaller model"):
        share_memory(2 * GIB, 2 * GIB, workers=1)
    with pytest.raises(NotEnoughMemory, match="9216 MiB KV pool"):
        share_memory(8 * GIB, MIB, workers=1, pool=9 * GIB)


def test_float32_doubles_the_weights_of_a_16_bit_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    assert weight_bytes(tmp_path, "auto") == 1000
    assert weight_bytes(tmp_path, "float32") == 2000
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": "float32"}))
    assert weight_bytes(tmp_path, "float32") == 1000


def test_this_machine_has_a_core_and_memory() -> None:
    assert len(cores()) >= 1
    assert free_memory() > 64 * MIB
