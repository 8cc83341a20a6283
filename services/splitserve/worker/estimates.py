"""Operations and bytes of a step, estimated from token counts and the model's sizes, as vLLM's MFU counters are.

Per step with T tokens computed, S rows through the output layer, A = sum over tokens of the positions each attends to,
and C = sum over decode rows of their length:

    operations = 2 T (weights of all layers) + 4 A (query width) + 2 S (weights of the output layer)
    read       = weights of all layers + KV of C positions + activations of T tokens + output layer if S
    written    = KV of T positions + activations of T tokens + logits of S rows

A layer's weights are those of its projections and of a gated feed-forward part; norms, biases and rotations are left
out. A layer reads, for each token, the inputs of its projections and its feed-forward part, and its queries; a prompt's
also its own keys and values. The estimate knows nothing of caches, of padding, or of experts that are not chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

from splitserve.engine.door import StepStats


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """Elements of one layer: width of its queries and of its keys and values together (0 where it has none of its own)."""

    query: int
    kv: int


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What the estimate reads of a model."""

    hidden: int
    feed_forward: int
    vocabulary: int
    layers: tuple[LayerSizes, ...]
    item_bytes: int  # of weights, activations and KV


@dataclass(frozen=True, slots=True)
class Work:
    """One step's estimate."""

    operations: int
    read_bytes: int
    written_bytes: int


class Estimator:
    """Sums over layers are made once; a step costs a dozen multiplications."""

    def __init__(self, sizes: ModelSizes) -> None:
        hidden, inner, layers = sizes.hidden, sizes.feed_forward, sizes.layers
        count = len(layers)
        query, kv = sum(layer.query for layer in layers), sum(layer.kv for layer in layers)
        self._item = sizes.item_bytes
        self._weights = hidden * (query + kv) + query * hidden + 3 * hidden * inner * count
        self._output = hidden * sizes.vocabulary
        self._vocabulary = sizes.vocabulary
        self._hidden = hidden
        self._query = query
        self._kv = kv
        self._read = 2 * hidden * count + 2 * query + 3 * inner * count
        self._written = query + kv + 2 * hidden * count + 3 * inner * count

    def of(self, stats: StepStats) -> Work:
        """The work of one step; none when it computed nothing that counts."""
        prefilled, samples = stats.prefill_tokens + stats.replayed_tokens, stats.samples
        tokens = prefilled + stats.decode_tokens
        if not tokens:
            return Work(0, 0, 0)
        operations = 2 * tokens * self._weights + 4 * stats.attended * self._query + 2 * samples * self._output
        read = self._weights + tokens * self._read + (prefilled + stats.context) * self._kv
        read += (self._output + samples * self._hidden) if samples else 0
        written = tokens * (self._written + self._kv) + samples * self._vocabulary
        return Work(operations, read * self._item, written * self._item)
