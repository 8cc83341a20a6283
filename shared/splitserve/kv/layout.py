"""How KV lies in memory: the one object that pool, transport, attention and fingerprint share. Nothing here loads torch.

A block of a group is one run of bytes; inside it `[layer][K|V][kv_head][token][dim]`: head-major, because a range of KV heads
must be contiguous for unequal tensor parallelism, and because a gathered `[heads, tokens, dim]` is what attention wants.
Shapes are per layer: K and V dims differ for MLA, heads and head size differ between the layers of some models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Literal

ALIGNMENT = 64  # bytes; of each layer's run and so of each block: a cache line, and any element size divides it

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

GroupKind = Literal["attention", "latent", "state"]


@dataclass(frozen=True, slots=True)
class LayerKV:
    """Shape of one layer's KV, and where its run starts in a block (`offset`, in bytes)."""

    layer: int  # index in the model
    kv_heads: int
    k_dim: int
    v_dim: int
    dtype: str
    offset: int = 0

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    def k_bytes(self, block_tokens: int) -> int:
        return self.kv_heads * block_tokens * self.k_dim * self.item_bytes

    def v_bytes(self, block_tokens: int) -> int:
        return self.kv_heads * block_tokens * self.v_dim * self.item_bytes

    def bytes(self, block_tokens: int) -> int:
        """Bytes of this layer's K and V in one block, without padding."""
        return self.k_bytes(block_tokens) + self.v_bytes(block_tokens)


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers whose KV shares block tables, in offset order. At first there is one, of all attention layers."""

    kind: GroupKind
    layers: tuple[LayerKV, ...]

    def block_bytes(self, block_tokens: int) -> int:
        if not self.layers:
            return 0
        last = self.layers[-1]
        return _aligned(last.offset + last.bytes(block_tokens))


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Groups of layers over one pool of equal blocks.

    `packing` names how a head's run is stored: "rows" = `[token][dim]`. Pool and transports treat it as opaque bytes;
    attention backends read it.
    """

    block_tokens: int
    groups: tuple[LayerGroup, ...]
    packing: str = "rows"

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of the pool (blocks of every group are drawn from the same pool)."""
        return max(group.block_bytes(self.block_tokens) for group in self.groups)

    @property
    def bytes_per_token(self) -> int:
        """KV bytes that one token costs, all groups together, rounded up."""
        return -(-sum(group.block_bytes(self.block_tokens) for group in self.groups) // self.block_tokens)

    def layer(self, index: int) -> LayerKV:
        """The shape of a model layer's KV. KeyError if the layer holds none."""
        for group in self.groups:
            for layer in group.layers:
                if layer.layer == index:
                    return layer
        raise KeyError(index)

    def factors(self) -> dict[str, str]:
        """What must be equal for two workers to read each other's blocks, each part by name."""
        shapes = sorted({(x.kv_heads, x.k_dim, x.v_dim, x.dtype) for group in self.groups for x in group.layers})
        return {
            "block_tokens": str(self.block_tokens),
            "block_bytes": str(self.block_bytes),
            "layers": "+".join(str(len(group.layers)) for group in self.groups),
            "shapes": ",".join(f"{heads}x{k}/{v}:{dtype}" for heads, k, v, dtype in shapes),
            "packing": self.packing,
            "digest": self.digest[:16],
        }

    @property
    def digest(self) -> str:
        """sha256 (hex) over every field: equal layouts have equal digests, in any process."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def attention_layout(block_tokens: int, layers: Iterable[LayerKV]) -> KVLayout:
    """A layout of one attention group; offsets are set here, in the order of `layers`. ValueError when there is none."""
    placed: list[LayerKV] = []
    offset = 0
    for layer in layers:
        placed.append(replace(layer, offset=offset))
        offset = _aligned(offset + layer.bytes(block_tokens))
    if not placed:
        raise ValueError("a KV layout needs at least one layer")
    return KVLayout(block_tokens, (LayerGroup("attention", tuple(placed)),))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
