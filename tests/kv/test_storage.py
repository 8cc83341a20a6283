"""Torch's views of a pool: the bytes that a transport sends are the tensors that attention reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from splitserve.kv.layout import KVLayout, LayerKV, attention_layout
from splitserve.kv.segment import Segment
from splitserve.kv.storage import KvStorage

EVEN = attention_layout(4, [LayerKV(i, 3, 8, 8, "float32") for i in range(2)])
UNEVEN = attention_layout(4, [LayerKV(0, 2, 6, 4, "float32"), LayerKV(3, 1, 5, 5, "bfloat16")])


@pytest.mark.parametrize("layout", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_a_layer_view_is_head_major_at_its_offset_in_each_block(layout: KVLayout) -> None:
    buffer = bytearray(5 * layout.block_bytes)
    storage = KvStorage(layout, 5, memoryview(buffer))
    for layer in layout.groups[0].layers:
        view = storage.view(layer.layer)
        assert view.k.shape == (5, layer.kv_heads, 4, layer.k_dim)
        assert view.v.shape == (5, layer.kv_heads, 4, layer.v_dim)
        view.k[2, layer.kv_heads - 1, 1] = 7.0
        view.v[4, 0, 3] = 9.0
        run = torch.frombuffer(buffer, dtype=view.k.dtype)
        item = layer.item_bytes
        k_at = (2 * layout.block_bytes + layer.offset) // item + ((layer.kv_heads - 1) * 4 + 1) * layer.k_dim
        v_at = (4 * layout.block_bytes + layer.offset + layer.k_bytes(4)) // item + 3 * layer.v_dim
        assert run[k_at : k_at + layer.k_dim].tolist() == [7.0] * layer.k_dim
        assert run[v_at : v_at + layer.v_dim].tolist() == [9.0] * layer.v_dim


def test_views_of_all_layers_cover_a_block_once() -> None:
    storage = KvStorage(UNEVEN, 2)
    for layer in UNEVEN.groups[0].layers:
        view = storage.view(layer.layer)
        for part in (view.k, view.v):
            assert (part == 0).all()
            part.fill_(1.0)


def test_the_row_table_names_the_same_bytes_as_the_views() -> None:
    storage = KvStorage(EVEN, 5)
    for layer in EVEN.groups[0].layers:
        view = storage.view(layer.layer)
        view.k.copy_(torch.randn(view.k.shape))
        view.v.copy_(torch.randn(view.v.shape))
        assert view.rows is not None
        for block in range(5):
            for head in range(3):
                row = block * view.rows_per_block + head
                assert torch.equal(view.rows[row], view.k[block, head].flatten())
                assert torch.equal(view.rows[row + 3], view.v[block, head].flatten())


def test_there_is_no_row_table_where_a_block_is_no_whole_number_of_runs() -> None:
    storage = KvStorage(UNEVEN, 2)
    assert storage.view(0).rows is None
    assert storage.view(3).rows is None


def test_a_shared_segment_is_written_through_the_views() -> None:
    segment = Segment.create(3, EVEN.block_bytes, EVEN.digest, 1)
    try:
        KvStorage(EVEN, 3, segment.pool).view(1).v[2].fill_(3.0)
        layer = EVEN.layer(1)
        start = 2 * EVEN.block_bytes + layer.offset + layer.k_bytes(4)
        assert (np.frombuffer(segment.pool[start : start + layer.v_bytes(4)], np.float32) == 3.0).all()
    finally:
        segment.close()


def test_a_buffer_that_is_too_small_or_read_only_is_an_error() -> None:
    size = 2 * EVEN.block_bytes
    with pytest.raises(ValueError, match=f"has {size - 1} bytes, the pool needs {size}"):
        KvStorage(EVEN, 2, memoryview(bytearray(size - 1)))
    with pytest.raises(ValueError, match="read only"):
        KvStorage(EVEN, 2, memoryview(bytes(size)))
    with pytest.raises(KeyError):
        KvStorage(EVEN, 2).view(2)
