"""What both workers' cores are told and ask for, beside `protocol.effects`."""

from __future__ import annotations

from dataclasses import dataclass

from splitserve.engine import door
from splitserve.protocol.handle import KvAddress


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this worker is in this life, and what it can hold."""

    name: str
    incarnation: int
    model: str
    fingerprint: str
    fingerprint_factors: tuple[tuple[str, str], ...]
    block_tokens: int
    total_blocks: int
    max_model_len: int
    chunk_tokens: int  # prefill budget of a step
    bytes_per_token: int
    addresses: tuple[KvAddress, ...] = ()
    metrics_url: str = ""


@dataclass(frozen=True, slots=True)
class EngineBatch:
    """Event: the engine's door opened."""

    batch: door.Batch


@dataclass(frozen=True, slots=True)
class ToEngine:
    """Command: through the engine's other door."""

    command: door.Command
