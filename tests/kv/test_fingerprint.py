"""Which KV is the same KV, and what is named when it is not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from splitserve.kv.fingerprint import Factors, differing_factor, fingerprint, fingerprint_factors, weights_digest
from splitserve.kv.layout import LayerKV, attention_layout

LAYOUT = attention_layout(16, [LayerKV(0, 2, 8, 8, "float32")])


def _factors(**changes: object) -> Factors:
    values: dict[str, object] = {
        "model": "LlamaForCausalLM", "weights": "ab" * 32, "dtype": "float32", "layout": LAYOUT,
        "rope": {"rope_theta": 1e4}, "protocol": "1", **changes,
    }  # fmt: skip
    return fingerprint_factors(**values)  # type: ignore[arg-type]


def test_the_same_model_has_the_same_fingerprint() -> None:
    assert fingerprint(_factors()) == fingerprint(_factors())
    assert differing_factor(_factors(), _factors()) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"protocol": "2"}, "protocol"),
        ({"weights": "cd" * 32}, "model"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"layout": attention_layout(32, LAYOUT.groups[0].layers)}, "layout"),
        ({"rope": {"rope_theta": 1e5}}, "rope"),
    ],
)
def test_each_factor_changes_the_fingerprint_and_is_named_with_both_values(
    change: dict[str, object], named: str
) -> None:
    ours, theirs = _factors(), _factors(**change)
    assert fingerprint(ours) != fingerprint(theirs)
    line = differing_factor(ours, theirs)
    assert line is not None
    assert line.startswith(f"{named}: here {dict(ours)[named]!r}, there {dict(theirs)[named]!r}")


def test_a_factor_that_only_one_side_has_is_named() -> None:
    more = (*_factors(), ("adapter", "x"))
    assert differing_factor(more, _factors()) == "adapter: here 'x', there 'nothing'"
    assert differing_factor(_factors(), more) == "adapter: here nothing, there 'x'"


def _folder(folder: Path, weights: np.ndarray, version: str = "5.24.0") -> Path:
    folder.mkdir()
    save_file({"w": weights}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "transformers_version": version}))
    return folder


def test_two_conversions_of_the_same_weights_have_one_digest(tmp_path: Path) -> None:
    weights = np.arange(100_000, dtype=np.float32)
    first, second = _folder(tmp_path / "a", weights), _folder(tmp_path / "b", weights, version="5.25.0")
    assert weights_digest(first) == weights_digest(second)


def test_a_fine_tune_of_the_same_shape_has_another_digest(tmp_path: Path) -> None:
    weights = np.arange(100_000, dtype=np.float32)
    assert weights_digest(_folder(tmp_path / "a", weights)) != weights_digest(_folder(tmp_path / "b", weights + 0.001))


def test_another_config_over_the_same_weights_has_another_digest(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "a", np.zeros(10, dtype=np.float32))
    before = weights_digest(folder)
    (folder / "config.json").write_text('{"hidden_size": 9}')
    assert weights_digest(folder) != before


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.safetensors"):
        weights_digest(tmp_path)
