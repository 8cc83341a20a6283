"""Layers as one call: each family against transformers in float32, with AMX tiles and without. Needs a CPU and a compiler."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from splitserve.engine.attention.chosen import ChosenBackend
from splitserve.engine.attention.native_backend import NativeBackend, native_plan
from splitserve.engine.attention.torch_backend import TorchBackend
from splitserve.engine.batch import StepRow
from splitserve.engine.context import register_attention
from splitserve.engine.exact import Exact, exact_logits
from splitserve.engine.forward import PagedModel
from splitserve.engine.fused import FusedHead, FusedRun, Fusion, decoder_layers, fusing_refusal
from splitserve.engine.kernels import FUSED_BOUND, Kernels
from splitserve.engine.linear import pack_linears
from splitserve.engine.loader import kv_layout
from splitserve.engine.probe import Layers, probe
from splitserve.kv.layout import KVLayout
from splitserve.kv.storage import KvStorage
from support.tiny_models import ADMITTED, CONTEXT, FUSABLE, make_model

pytestmark = pytest.mark.model  # what it compiles takes half a minute the first time


@dataclass(frozen=True, slots=True)
class Tried:
    """A tiny model in bfloat16, what its layers ask for, and its logits in float32."""

    model: PreTrainedModel
    layers: Layers
    layout: KVLayout
    exact: Exact


def tried(name: str) -> Tried:
    register_attention()
    torch.set_num_threads(1)
    config = FUSABLE[name]()
    model = make_model(config).bfloat16().eval()
    model.set_attn_implementation("splitserve")
    layers = probe(name, model, TorchBackend(16))
    return Tried(model, layers, kv_layout(layers, 16, "bfloat16"), exact_logits(model, layers, CONTEXT))


@pytest.fixture(params=FUSABLE)
def tiny(request: pytest.FixtureRequest, kernels: Path) -> Tried:
    return tried(request.param)


@pytest.mark.parametrize("amx", [False, True])
def test_a_familys_layers_as_one_call_are_as_near_to_float32_as_torchs(
    tiny: Tried, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if amx and not torch.ops.splitserve.amx_allowed():
        pytest.skip("this CPU has no AMX")
    if not amx:
        monkeypatch.setattr("splitserve.engine.fused.amx_allowed", lambda: False)
        monkeypatch.setattr("splitserve.engine.attention.native_backend.amx_allowed", lambda: False)
    by_torch = tiny.exact.error(tiny.model, tiny.layers, TorchBackend(16), tiny.layout)
    fusion = Fusion.of(tiny.model, tiny.layers)
    fused = tiny.exact.error(fusion.tried_on(tiny.model), tiny.layers, NativeBackend(16, torch.bfloat16), tiny.layout)
    assert fused <= max(1.5 * by_torch, 0.01)
    assert fused <= FUSED_BOUND


def test_trying_a_fusion_leaves_the_model_as_it_is_and_putting_it_in_does_not(tiny: Tried) -> None:
    own, head = decoder_layers(tiny.model), tiny.model.get_output_embeddings()
    fusion = Fusion.of(tiny.model, tiny.layers)
    fusion.tried_on(tiny.model)
    assert decoder_layers(tiny.model) is own
    assert tiny.model.get_output_embeddings() is head
    fusion.put_into(tiny.model)
    own = decoder_layers(tiny.model)
    assert own
    assert all(isinstance(layer, FusedRun) for layer in own)
    assert isinstance(tiny.model.get_output_embeddings(), FusedHead)


@pytest.mark.parametrize(("name", "calls"), [("llama", 1), ("gemma3, window 9", None)])
def test_layers_that_share_position_embeddings_are_one_call(kernels: Path, name: str, calls: int | None) -> None:
    tiny = tried(name)
    layers = decoder_layers(tiny.model)
    assert layers is not None
    assert len(layers) > 1
    assert len(Fusion.of(tiny.model, tiny.layers).runs) == (calls or len(layers))


def test_packed_weights_are_fused_as_plain_ones_are(kernels: Path) -> None:
    plain, packed = tried("llama"), tried("llama")
    assert pack_linears(packed.model, torch.bfloat16)
    outputs = [Fusion.of(tiny.model, tiny.layers).tried_on(tiny.model) for tiny in (plain, packed)]
    backend = NativeBackend(16, torch.bfloat16)
    errors = [
        plain.exact.error(model, tiny.layers, backend, plain.layout) for model, tiny in zip(outputs, (plain, packed))
    ]
    assert errors[0] == errors[1]


@pytest.mark.parametrize("rows", [[(0, 1)], [(0, 33)], [(31, 1), (16, 1), (3, 1)], [(40, 1), (0, 70), (17, 5)]])
def test_what_lies_in_unused_slots_is_never_read_into_logits(kernels: Path, rows: list[tuple[int, int]]) -> None:
    assert torch.isfinite(_logits(tried("llama"), rows)).all()


@pytest.mark.parametrize("rows", [[(40, 1), (17, 5)], [(0, 33)], [(40, 1), (16, 1), (0, 70), (17, 5)]])
def test_a_last_layer_that_looks_at_the_kept_tokens_alone_gives_their_logits(
    tiny: Tried, rows: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = _logits(tiny, rows)
    monkeypatch.setattr("splitserve.engine.forward.native_plan", lambda context, keep: native_plan(context))
    every = _logits(tiny, rows)
    assert float((few - every).square().mean().sqrt() / every.std()) < 0.01


def test_two_threads_give_what_one_gives(kernels: Path) -> None:
    rows = [(40, 1), (17, 1), (0, 70), (30, 60)]
    tiny, before = tried("qwen3"), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = _logits(tiny, rows)
        torch.set_num_threads(2)
        assert torch.equal(_logits(tiny, rows), alone)
    finally:
        torch.set_num_threads(before)


def _logits(tiny: Tried, rows: list[tuple[int, int]]) -> torch.Tensor:
    """Of each row's last token; what the pool holds before a row's start is drawn, what nobody wrote is NaN."""
    needed = [-(-sum(row) // 16) for row in rows]
    storage = KvStorage(tiny.layout, sum(needed))
    generator = torch.Generator().manual_seed(1)
    blocks = iter(range(storage.blocks))
    tables = [[next(blocks) for _ in range(count)] for count in needed]
    for layer in {asked.kv_layer for asked in tiny.layers.values()}:
        view = storage.view(layer)
        for pool in (view.k, view.v):
            pool.fill_(float("nan"))
            for (start, _), table in zip(rows, tables, strict=True):
                for position in range(start):
                    drawn = torch.randn(pool.shape[1], pool.shape[3], generator=generator)
                    pool[table[position // 16], :, position % 16] = drawn.to(pool.dtype)
    model = Fusion.of(tiny.model, tiny.layers).tried_on(tiny.model)
    paged = PagedModel(model, tiny.layers, NativeBackend(16, torch.bfloat16), storage)
    step = [StepRow([5] * count, start, [table]) for (start, count), table in zip(rows, tables, strict=True)]
    ends = [sum(count for _, count in rows[: n + 1]) - 1 for n in range(len(rows))]
    decodes = next((n for n, row in enumerate(rows) if row[1] > 1), len(rows))
    return paged.logits(step, decodes, ends)


@pytest.mark.parametrize("name", ["gpt2", "olmo2", "llama", "gemma4, shared KV, window 9"])
def test_what_is_no_known_family_or_size_is_left_to_torch_with_a_reason(name: str) -> None:
    register_attention()
    model = make_model(ADMITTED[name]()).eval()
    model.set_attn_implementation("splitserve")
    refusal = fusing_refusal(model, probe(name, model, TorchBackend(16)))
    assert refusal is not None
    assert any(word in refusal for word in ("elsewhere", "is none of", "multiples"))


def test_layers_that_give_wrong_logits_are_not_put_in(kernels: Path, tmp_path: Path) -> None:
    tiny = tried("llama")
    wrong = replace(tiny.exact, logits=tiny.exact.logits + torch.randn_like(tiny.exact.logits))
    chosen = ChosenBackend(TorchBackend(16))
    assert Kernels(chosen, tiny.model, tiny.layers, tiny.layout, kernels, wrong).build()
    assert chosen.name == "native"
    assert not any(isinstance(layer, FusedRun) for layer in decoder_layers(tiny.model) or ())
    assert Kernels(chosen, tiny.model, tiny.layers, tiny.layout, kernels, tiny.exact).build()
    assert [type(layer) for layer in decoder_layers(tiny.model) or ()] == [FusedRun]
