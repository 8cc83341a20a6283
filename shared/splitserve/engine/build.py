"""An engine over a loaded model: the one place where torch's half and the pure half meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from splitserve.config import EngineSettings
from splitserve.engine.cuda.capture import GraphedModel, capture_decodes
from splitserve.engine.cuda.graphs import record_on_gpu
from splitserve.engine.engine import Engine
from splitserve.engine.forward import PagedModel
from splitserve.engine.loader import LoadedModel, served_context
from splitserve.engine.runner import TorchRunner
from splitserve.engine.sampler import Sampler
from splitserve.engine.sequence import EngineConfig
from splitserve.kv.pool import BlockPool, Generations
from splitserve.kv.prefix import PrefixIndex
from splitserve.kv.storage import KvStorage

Role = Literal["prefill", "decode"]
Buffer = memoryview | torch.Tensor

PRIVATE_BLOCKS = 1  # behind a GPU's pool: where the padding of captured steps writes

# Prefill budget of a step in tokens, where nothing else is said
_CHUNK_TOKENS = {("prefill", "cpu"): 512, ("prefill", "cuda"): 2048, ("decode", "cpu"): 40, ("decode", "cuda"): 256}
_LONE_CHUNK_TOKENS = {"cpu": 256, "cuda": 2048}  # of a decode worker while it decodes nothing
_TOKENS_A_DECODE = 2  # about what a sequence's token costs a CPU, its context and logits counted, in tokens of a prompt


def chunk_tokens(settings: EngineSettings, role: Role, device: str) -> int:
    """Prompt tokens that a worker of `role` computes in a step on `device` ("cpu", "cuda")."""
    given = settings.max_num_batched_tokens if role == "prefill" else settings.decode_chunk_tokens
    return given or _CHUNK_TOKENS[role, device]


def lone_chunk_tokens(settings: EngineSettings, role: Role, device: str) -> int:
    """The same in a step without decodes; what the user gave holds for both. A sequence handed over waits for such a step."""
    if role == "prefill" or settings.decode_chunk_tokens:
        return chunk_tokens(settings, role, device)
    return _LONE_CHUNK_TOKENS[device]


def build_runner(loaded: LoadedModel, blocks: int, buffer: Buffer | None = None, max_num_seqs: int = 1) -> TorchRunner:
    """`buffer`: a shared segment's pool (writable, `blocks` blocks), or a GPU's (with `PRIVATE_BLOCKS` more); None:
    memory of its own. `max_num_seqs`: the largest decode step that is captured on a GPU."""
    sampler = Sampler(loaded.eos_ids, loaded.vocab_size)
    if loaded.device.type != "cuda":
        storage = KvStorage(loaded.layout, blocks, buffer, loaded.device)
        return TorchRunner(PagedModel(loaded.model, loaded.layers, loaded.backend, storage, loaded.device), sampler)
    storage = KvStorage(loaded.layout, blocks + PRIVATE_BLOCKS, buffer, loaded.device)
    paged = PagedModel(loaded.model, loaded.layers, loaded.backend, storage, loaded.device)
    width = -(-served_context(loaded, blocks) // loaded.layout.block_tokens)
    graphs = capture_decodes(
        loaded.model,
        loaded.layers,
        loaded.backend.current,
        storage,
        paged,
        blocks=blocks,
        width=width,
        most=max_num_seqs,
        record=record_on_gpu(),
    )
    return TorchRunner(paged if graphs is None else GraphedModel(paged, graphs), sampler)


def build_engine(
    loaded: LoadedModel,
    buffer: Buffer | None,
    generations: Generations | None,
    blocks: int,
    settings: EngineSettings,
    role: Role,
    clock: Callable[[], float],
) -> Engine:
    """`buffer` and `generations` are a segment's (`kv/segment`) or a GPU's, or None for memory of this process alone."""
    config = EngineConfig(
        block_tokens=loaded.layout.block_tokens,
        max_num_seqs=settings.max_num_seqs,
        chunk_tokens=chunk_tokens(settings, role, loaded.device.type),
        max_model_len=served_context(loaded, blocks),
        eos_ids=frozenset(loaded.eos_ids),
        fingerprint=loaded.fingerprint,
        prefix_caching=settings.enable_prefix_caching,
        lone_chunk_tokens=lone_chunk_tokens(settings, role, loaded.device.type),
        tokens_a_decode=_TOKENS_A_DECODE,
    )
    pool = BlockPool(blocks, generations)
    runner = build_runner(loaded, blocks, buffer, settings.max_num_seqs)
    return Engine(config, pool, PrefixIndex(pool), runner, clock)
