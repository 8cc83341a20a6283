"""What a worker computes with: the model, its KV pool and the engine over both. Made once at start, in a thread."""

from __future__ import annotations

import ctypes
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from splitserve.config import WorkerProcessSettings
from splitserve.engine.build import PRIVATE_BLOCKS, build_engine, chunk_tokens
from splitserve.engine.engine import Engine
from splitserve.engine.loader import load_model, pool_blocks, served_context
from splitserve.kv.cuda import load_cuda
from splitserve.kv.device import DeviceMemory
from splitserve.kv.segment import Segment
from splitserve.kv.storage import device_bytes
from splitserve.model.resolve import resolve, served_names
from splitserve.protocol.states import Role
from splitserve.worker.effects import Identity
from splitserve.worker.estimates import ModelSizes
from splitserve.worker.facts import cache_config, sizes_of


@dataclass(frozen=True, slots=True)
class Machine:
    """`identity` lacks only the addresses, which the data plane adds."""

    identity: Identity
    engine: Engine
    segment: Segment
    sizes: ModelSizes
    cache_config: Mapping[str, str]  # labels of vllm:cache_config_info

    def close(self) -> None:
        self.segment.close()


def build_machine(settings: WorkerProcessSettings, role: Role, name: str, metrics_url: str) -> Machine:
    """Blocks for seconds. Raises StartupError: a model that cannot be had or served, too little memory."""
    folder = resolve(settings.model)
    loaded = load_model(folder, model=settings.model, engine=settings.engine)
    _give_back_freed_memory()
    blocks = pool_blocks(loaded, settings.engine)
    incarnation = secrets.randbits(63) | 1
    on_gpu = loaded.device.type == "cuda"
    device = DeviceMemory(load_cuda(), blocks, loaded.layout.block_bytes, private=PRIVATE_BLOCKS) if on_gpu else None
    segment = Segment.create(
        blocks,
        loaded.layout.block_bytes,
        loaded.layout.digest,
        incarnation,
        checksummed=settings.transfer.kv_checksum == "all",
        device=device,
        shared=role is Role.PREFILL,
    )
    pool = device_bytes(device.address, device.size) if device else segment.pool
    which = "prefill" if role is Role.PREFILL else "decode"
    engine = build_engine(loaded, pool, segment.generations, blocks, settings.engine, which, time.monotonic)
    identity = Identity(
        name=name,
        incarnation=incarnation,
        model=served_names(settings.model)[0],
        fingerprint=loaded.fingerprint,
        fingerprint_factors=loaded.fingerprint_factors,
        block_tokens=loaded.layout.block_tokens,
        total_blocks=blocks,
        max_model_len=served_context(loaded, blocks),
        chunk_tokens=chunk_tokens(settings.engine, which, loaded.device.type),
        bytes_per_token=loaded.layout.bytes_per_token,
        metrics_url=metrics_url,
    )
    if loaded.kernels is not None:
        loaded.kernels.build_in_background()
    cache = cache_config(loaded, settings.engine, blocks, identity.max_model_len)
    return Machine(identity, engine, segment, sizes_of(loaded), cache)


def _give_back_freed_memory() -> None:
    """What loading freed goes back to the system; glibc would keep it (measured: 160 of 790 MiB, with a model of 135M)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
