"""Packed linear layers: the same product, the same model, no second copy of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from splitserve.engine.linear import PackedLinear, pack_linears, packing_refusal
from support.tiny_models import ADMITTED, make_model

needs_packing = pytest.mark.skipif(
    packing_refusal(torch.float32) is not None, reason="this build of torch has no oneDNN for this CPU"
)


@needs_packing
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("rows", [1, 3, 16, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_gives_the_plain_product(dtype: torch.dtype, tolerance: float, rows: int, bias: bool) -> None:
    if packing_refusal(dtype) is not None:
        pytest.skip(f"no oneDNN for {dtype} on this CPU")
    torch.manual_seed(0)
    weight, x = torch.randn(40, 24).to(dtype), torch.randn(1, rows, 24).to(dtype)
    offset = torch.randn(40).to(dtype) if bias else None
    with torch.no_grad():
        got = PackedLinear(weight, offset)(x)
    assert got.shape == (1, rows, 40)
    exact = functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
    torch.testing.assert_close(got.double(), exact, atol=tolerance * 5, rtol=tolerance)


@needs_packing
def test_no_rows_give_no_product() -> None:
    with torch.no_grad():
        assert PackedLinear(torch.randn(40, 24), None)(torch.empty(1, 0, 24)).shape == (1, 0, 40)


@needs_packing
def test_the_plain_weight_can_still_be_looked_at() -> None:
    weight = torch.randn(40, 24)
    with torch.no_grad():
        assert torch.equal(PackedLinear(weight, None).weight, weight)


@needs_packing
@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2", "qwen2"])
def test_a_packed_model_computes_what_the_plain_one_does(name: str) -> None:
    model = make_model(ADMITTED[name]())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        count = pack_linears(model, torch.float32)
        after = model(input_ids=ids, use_cache=False).logits
    assert count > 0
    assert not any(type(module) in (nn.Linear, Conv1D) for module in model.modules())
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


@needs_packing
def test_tied_embeddings_still_look_tokens_up_and_only_they_are_kept_beside_the_packing() -> None:
    model = make_model(ADMITTED["llama tied"]())
    table = model.get_input_embeddings().weight
    pack_linears(model, torch.float32)
    assert model.get_input_embeddings().weight is table
    large = [name for name, parameter in model.named_parameters() if parameter.dim() == 2]
    assert large == ["model.embed_tokens.weight"]


def test_layers_of_another_format_and_subclasses_stay_plain() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # the parent's name
            return 2 * super().forward(input)

    model = nn.Sequential(Doubled(8, 8), nn.Linear(8, 8, dtype=torch.float16))
    assert pack_linears(model, torch.float32) == 0
    assert type(model[0]) is Doubled


def test_formats_that_onednn_is_not_used_for_are_left_with_a_reason() -> None:
    assert packing_refusal(torch.float16) == "oneDNN is not used for torch.float16"
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.float16))
    assert pack_linears(model, torch.float16) == 0
    assert type(model[0]) is nn.Linear
