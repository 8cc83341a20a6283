"""Which models are served: each architecture that the gate admits answers as transformers does, each other has its line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from splitserve.engine.attention.base import LayerAttention
from splitserve.engine.attention.torch_backend import TorchBackend
from splitserve.engine.probe import probe
from splitserve.engine.selfcheck import check_against_reference
from splitserve.errors import ConfigError, ModelUnavailable, NotEnoughMemory, UnsupportedModel
from splitserve.protocol.params import SamplingParams
from support.tiny_models import ADMITTED, CONTEXT, LONGROPE, REFUSED, VOCABULARY, save_model, save_refused
from support.torch_engines import answers, engine_over, load

PARAMS = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


def _prompts(*lengths: int) -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [generator.integers(3, VOCABULARY, length).tolist() for length in lengths]


def _generate(model: Any, prompt: list[int]) -> list[int]:
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=PARAMS.max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ADMITTED)
def test_an_admitted_architecture_answers_as_generate_does_in_ragged_chunks(name: str, tmp_path: Path) -> None:
    model = save_model(ADMITTED[name](), tmp_path)
    prompts = _prompts(1, 23, 40, 11)
    engine = engine_over(load(tmp_path), chunk=7)
    assert [answer.ids for answer in answers(engine, prompts, PARAMS)] == [_generate(model, p) for p in prompts]


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_architecture_has_one_line_that_names_model_and_cause(name: str, tmp_path: Path) -> None:
    make, cause = REFUSED[name]
    save_refused(make(), tmp_path)
    with pytest.raises(UnsupportedModel) as refusal:
        load(tmp_path)
    assert refusal.value.message.startswith(f"{tmp_path.name} cannot be served: {cause}")
    assert "\n" not in refusal.value.message


def test_short_sequences_use_the_short_longrope_factors_when_no_long_one_can_come(tmp_path: Path) -> None:
    model = save_model(tf.Phi3Config(**_phi3(), rope_parameters=LONGROPE), tmp_path)
    prompts = _prompts(5, 17)
    engine = engine_over(load(tmp_path, max_model_len=32), chunk=7)
    assert [answer.ids for answer in answers(engine, prompts, PARAMS)] == [_generate(model, p) for p in prompts]


def test_a_short_sequence_answers_the_same_beside_a_long_one_under_longrope(tmp_path: Path) -> None:
    save_model(tf.Phi3Config(**_phi3(), rope_parameters=LONGROPE), tmp_path)
    short, long = _prompts(9, 60)
    loaded = load(tmp_path)
    alone = answers(engine_over(loaded, chunk=64), [short], PARAMS)[0]
    together = answers(engine_over(loaded, chunk=64), [short, long], PARAMS)[0]
    assert together.ids == alone.ids


def _phi3() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
        "original_max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [{"window": 8}, {"window": None}, {"scale": 0.3}, {"softcap": 1.0}],
    ids=["a window that is one short", "no window", "another scale", "another softcap"],
)
def test_the_self_check_finds_a_layer_that_is_not_what_the_model_computes(
    wrong: dict[str, Any], tmp_path: Path
) -> None:
    save_model(ADMITTED["gemma2, window 9"](), tmp_path)
    loaded = load(tmp_path)
    layers = {module: _changed(layer, wrong) for module, layer in loaded.layers.items()}
    with pytest.raises(UnsupportedModel, match="with paged attention its logits are off"):
        check_against_reference("m", loaded.model, layers, loaded.backend, loaded.layout, CONTEXT)


def _changed(layer: LayerAttention, wrong: dict[str, Any]) -> LayerAttention:
    return layer if layer.window is None else replace(layer, **wrong)


def test_a_window_that_config_and_code_disagree_on_is_refused(tmp_path: Path) -> None:
    save_model(ADMITTED["cohere2, window 9"](), tmp_path)
    loaded = load(tmp_path)
    loaded.model.config.sliding_window = 10
    with pytest.raises(UnsupportedModel, match="in layer 0, its config says a window of 10, its code one of 9"):
        probe("m", loaded.model, TorchBackend(16))


def test_a_longer_context_than_the_model_takes_is_refused_with_both_numbers(tmp_path: Path) -> None:
    save_model(ADMITTED["llama"](), tmp_path)
    with pytest.raises(
        ConfigError, match=rf"--max-model-len {CONTEXT + 1} is more than .* can take \({CONTEXT} tokens\)"
    ):
        load(tmp_path, max_model_len=CONTEXT + 1)


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    save_model(ADMITTED["llama"](), tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelUnavailable, match=r"lacks 1 of its weights, the first is model\.layers\.1\.mlp\.up_proj"):
        load(tmp_path)


def test_weights_that_are_cut_short_are_refused(tmp_path: Path) -> None:
    save_model(ADMITTED["llama"](), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelUnavailable, match=f"the weights of {tmp_path.name} cannot be read: "):
        load(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"has no config\.json"):
        load(tmp_path)


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(ADMITTED["llama"](), tmp_path)
    monkeypatch.setattr("splitserve.engine.checkpoint.free_memory", lambda device: 1000)
    with pytest.raises(NotEnoughMemory, match=r"need \d+ bytes in float32, 1000 are free on cpu"):
        load(tmp_path)
