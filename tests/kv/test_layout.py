"""How KV lies in a block: sizes, offsets, and what makes two layouts different."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.kv.layout import ALIGNMENT, KVLayout, LayerKV, attention_layout

SMOLLM2 = attention_layout(16, [LayerKV(i, 3, 64, 64, "bfloat16") for i in range(30)])

layers = st.builds(
    LayerKV,
    layer=st.integers(0, 99),
    kv_heads=st.integers(1, 8),
    k_dim=st.integers(1, 48),
    v_dim=st.integers(1, 48),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)


def test_a_block_of_smollm2_holds_16_tokens_of_23040_bytes() -> None:
    assert SMOLLM2.bytes_per_token == 2 * 30 * 3 * 64 * 2
    assert SMOLLM2.block_bytes == 16 * SMOLLM2.bytes_per_token


@given(st.integers(1, 64), st.lists(layers, min_size=1, max_size=6))
def test_layers_follow_each_other_aligned_and_never_overlap(block_tokens: int, shapes: list[LayerKV]) -> None:
    layout = attention_layout(block_tokens, shapes)
    end = 0
    for layer in layout.groups[0].layers:
        assert layer.offset % ALIGNMENT == 0
        assert 0 <= layer.offset - end < ALIGNMENT
        end = layer.offset + layer.bytes(block_tokens)
    assert 0 <= layout.block_bytes - end < ALIGNMENT
    assert layout.bytes_per_token * block_tokens >= layout.block_bytes


def test_a_layer_is_found_by_its_index_in_the_model() -> None:
    assert SMOLLM2.layer(7).offset == 7 * 16 * 3 * 2 * 64 * 2
    with pytest.raises(KeyError):
        SMOLLM2.layer(30)


def test_a_layout_without_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        attention_layout(16, [])


def test_equal_layouts_have_equal_digests_in_any_process() -> None:
    assert SMOLLM2.digest == attention_layout(16, [LayerKV(i, 3, 64, 64, "bfloat16") for i in range(30)]).digest
    assert SMOLLM2.digest.startswith("d95e23b37158a026")


@pytest.mark.parametrize(
    ("other", "factor"),
    [
        (attention_layout(32, SMOLLM2.groups[0].layers), "block_tokens"),
        (attention_layout(16, SMOLLM2.groups[0].layers[:29]), "layers"),
        (attention_layout(16, [LayerKV(i, 3, 64, 64, "float32") for i in range(30)]), "shapes"),
        (replace(SMOLLM2, packing="pairs"), "packing"),
    ],
)
def test_what_differs_between_two_layouts_shows_in_a_named_factor(other: KVLayout, factor: str) -> None:
    assert other.digest != SMOLLM2.digest
    assert other.factors()[factor] != SMOLLM2.factors()[factor]
