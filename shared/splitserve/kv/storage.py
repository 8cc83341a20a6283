"""Torch's view of the pool: the same bytes that transports send, as tensors that attention reads and writes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from splitserve.errors import EngineFailed
from splitserve.kv.layout import KVLayout, LayerKV

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, eq=False)
class LayerView:
    """One layer's KV in the pool: `k [blocks, H, B, Dk]`, `v [blocks, H, B, Dv]`, strided views of the same bytes.

    Where the shapes allow it, `rows [N, B * D]` is the same memory as one table with a row per run of a head, from this
    layer's first on: row `block * rows_per_block + h` holds K of head h, `+ H + h` its V. One `index_select` then gathers
    both by plain copies; elsewhere it is None.
    """

    k: torch.Tensor
    v: torch.Tensor
    rows: torch.Tensor | None
    rows_per_block: int


class KvStorage:
    """`blocks` blocks of `layout` over `buffer`, a segment's writable pool or a tensor of bytes on `device`, or over
    memory of its own.

    The pool's tables (free list, generations) are not kept here. ValueError if the buffer is too small or read only.
    """

    def __init__(
        self,
        layout: KVLayout,
        blocks: int,
        buffer: memoryview | torch.Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layout = layout
        self.blocks = blocks
        size = blocks * layout.block_bytes
        if buffer is None:
            self.bytes = torch.zeros(size, dtype=torch.uint8, device=device)
        else:
            self.bytes = _over(buffer, size)
        self._views = {layer.layer: self._make_view(layer) for group in layout.groups for layer in group.layers}

    def view(self, layer: int) -> LayerView:
        """KeyError if the layer holds no KV."""
        return self._views[layer]

    def _make_view(self, layer: LayerKV) -> LayerView:
        tokens, heads = self.layout.block_tokens, layer.kv_heads
        typed = self.bytes.view(DTYPES[layer.dtype])
        stride = self.layout.block_bytes // layer.item_bytes
        k_start = layer.offset // layer.item_bytes
        v_start = k_start + layer.k_bytes(tokens) // layer.item_bytes

        def strided(start: int, dim: int) -> torch.Tensor:
            return typed.as_strided((self.blocks, heads, tokens, dim), (stride, tokens * dim, dim, 1), start)

        run = tokens * layer.k_dim
        rows, rows_per_block = None, stride // run
        if layer.k_dim == layer.v_dim and stride % run == 0:
            count = (self.blocks - 1) * rows_per_block + 2 * heads
            rows = typed.as_strided((count, run), (run, 1), k_start)
        return LayerView(strided(k_start, layer.k_dim), strided(v_start, layer.v_dim), rows, rows_per_block)


def _over(buffer: memoryview | torch.Tensor, size: int) -> torch.Tensor:
    if buffer.nbytes < size:
        raise ValueError(f"the KV buffer has {buffer.nbytes} bytes, the pool needs {size}")
    if isinstance(buffer, torch.Tensor):
        return buffer[:size]
    if buffer.readonly:
        raise ValueError("the KV buffer is read only")
    return torch.frombuffer(buffer, dtype=torch.uint8, count=size)


class _DeviceBytes:
    """Tells torch where bytes of a GPU lie (the CUDA array interface, version 3); torch does not own them."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3,
        }  # fmt: skip


def device_bytes(address: int, size: int) -> torch.Tensor:
    """A uint8 tensor over `size` bytes of the GPU, which must stay allocated as long as it is used."""
    tensor = torch.as_tensor(_DeviceBytes(address, size), device="cuda")
    if tensor.data_ptr() != address:
        raise EngineFailed("torch copied the KV pool instead of looking at it")
    return tensor
