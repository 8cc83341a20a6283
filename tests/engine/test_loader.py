"""What a load decides: the number format, the ids that end an answer, the fingerprint, the device."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from splitserve.config import EngineSettings, ModelSettings
from splitserve.engine.loader import load_model
from splitserve.errors import ConfigError, UnsupportedModel
from splitserve.kv.fingerprint import differing_factor
from support.tiny_models import ADMITTED, make_model, save_model
from support.torch_engines import load


@pytest.fixture(scope="module")
def bfloat16_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bfloat16")
    model = make_model(ADMITTED["llama"]())
    torch.nn.Module.to(model, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def test_auto_is_the_checkpoints_format_on_a_cpu_that_is_fast_in_it(
    bfloat16_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitserve.engine.checkpoint.made_for_bfloat16", lambda device: True)
    loaded = load(bfloat16_folder, "auto")
    assert (loaded.dtype, loaded.model.dtype) == ("bfloat16", torch.bfloat16)
    assert loaded.layout.groups[0].layers[0].dtype == "bfloat16"


def test_auto_is_the_checkpoints_format_on_another_cpu_where_a_trial_shows_it_to_be_the_faster(
    bfloat16_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitserve.engine.checkpoint.made_for_bfloat16", lambda device: False)
    monkeypatch.setattr("splitserve.engine.checkpoint.bfloat16_is_faster", lambda cache: True)
    assert load(bfloat16_folder, "auto").dtype == "bfloat16"


def test_auto_is_float32_on_a_cpu_that_is_slow_in_bfloat16_and_says_so_once(
    bfloat16_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("splitserve.engine.checkpoint.made_for_bfloat16", lambda device: False)
    monkeypatch.setattr("splitserve.engine.checkpoint.bfloat16_is_faster", lambda cache: False)
    with caplog.at_level(logging.INFO, "splitserve.engine"):
        loaded = load(bfloat16_folder, "auto")
    assert (loaded.dtype, loaded.model.dtype) == ("float32", torch.float32)
    assert [r.message for r in caplog.records if "computing in float32" in r.message] == [
        "computing in float32: this CPU is slow in the checkpoint's format"
    ]


def test_a_format_that_was_asked_for_is_taken(bfloat16_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitserve.engine.checkpoint.made_for_bfloat16", lambda device: False)
    assert load(bfloat16_folder, "bfloat16").dtype == "bfloat16"


def test_all_ids_of_the_generation_config_end_an_answer(tmp_path: Path) -> None:
    save_model(ADMITTED["llama"](), tmp_path)
    assert load(tmp_path).eos_ids == (2,)
    GenerationConfig(eos_token_id=[5, 2, 9]).save_pretrained(tmp_path)
    assert load(tmp_path).eos_ids == (5, 2, 9)
    (tmp_path / "generation_config.json").unlink()
    assert load(tmp_path).eos_ids == (2,)


def test_two_loads_of_one_model_can_read_each_others_kv_and_of_two_formats_cannot(bfloat16_folder: Path) -> None:
    first, second = load(bfloat16_folder), load(bfloat16_folder)
    assert first.fingerprint == second.fingerprint
    other = load(bfloat16_folder, "bfloat16")
    assert other.fingerprint != first.fingerprint
    line = differing_factor(first.fingerprint_factors, other.fingerprint_factors)
    assert line == "dtype: here 'float32', there 'bfloat16'"


def test_an_architecture_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_thing"}')
    with pytest.raises(UnsupportedModel, match=f"{tmp_path.name} cannot be served: .*no_such_thing"):
        load(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(bfloat16_folder: Path) -> None:
    with pytest.raises(ConfigError, match="torch sees no GPU here; use --device cpu"):
        load_model(bfloat16_folder, model=ModelSettings(), engine=EngineSettings(device="cuda"))
