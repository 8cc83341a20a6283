"""The KV handle: a small message that says where a prompt's KV blocks lie, and proves which ones they are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KvAddress:
    """One way to a worker's pool, most preferred first in a list.

    `host` is the boot id of the machine: the address of a unix socket is usable only where it is equal *and* the socket
    answers.
    """

    transport: str  # "shm" | "cuda_ipc" | "tcp" | "nixl"
    address: str  # shm, cuda_ipc: path of the unix socket; tcp, nixl: "host:port"
    host: str = ""


@dataclass(frozen=True, slots=True)
class GroupBlocks:
    """Blocks of one layer group, in position order, with the generation each had when the handle was made."""

    group: int
    blocks: tuple[int, ...]
    generations: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KvHandle:
    """KV of positions [0, kv_tokens) of a prompt, held by `owner` under a lease.

    There is no list of hashes: the reader has the ids and computes the chain itself while prefill runs;
    `chain_hash` (hex, of the last full block; "" when there is none) proves that both read the same tokens.
    """

    id: str
    rid: str
    pa: int
    owner: str  # worker name
    incarnation: int
    fingerprint: str
    kv_tokens: int
    groups: tuple[GroupBlocks, ...]
    chain_hash: str
    token: str  # 128 bits, hex; guards the tcp transport
    ttl_s: float
    addresses: tuple[KvAddress, ...]
    shards: tuple[str, ...] = ()  # a segment per tensor-parallel rank; empty = one


@dataclass(frozen=True, slots=True)
class KvSource:
    """Where a decode worker will find the KV that it is told to await."""

    worker: str
    incarnation: int
    addresses: tuple[KvAddress, ...]
