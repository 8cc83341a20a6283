"""From a handle and a reservation to pairs of blocks: what must agree before a byte is copied."""

from __future__ import annotations

from collections.abc import Sequence

from splitserve.decode.job import Job
from splitserve.engine import door
from splitserve.kv.prefix import block_hashes, chain_seed
from splitserve.kv.transfer.base import BlockPair
from splitserve.protocol.handle import KvHandle
from splitserve.protocol.messages import KvReady


def prompt_ids(job: Job) -> tuple[int, ...]:
    """What the handle must cover: with one sequence its delivered tokens are read with the prompt."""
    asked = job.asked
    return asked.ids + asked.outputs[0] if len(asked.outputs) == 1 else asked.ids


def chain_hash(ids: Sequence[int], block_tokens: int, fingerprint: str, cache_salt: str) -> str:
    """Hex hash of the last full block; "" when there is none."""
    hashes = block_hashes(ids, block_tokens, chain_seed(fingerprint, cache_salt=cache_salt))
    return hashes[-1].hex() if hashes else ""


def difference(job: Job, ready: KvReady, reserved: door.Reserved, block_tokens: int) -> str | None:
    """Why these blocks are not those of this job's tokens, with both values; None when they are."""
    handle = ready.handle
    ids = prompt_ids(job)
    index = len(ids) - len(job.asked.ids)
    blocks = -(-len(ids) // block_tokens)
    theirs = [len(group.blocks) for group in handle.groups]
    ours = [len(group) for group in reserved.groups]
    for what, here, there in (
        ("tokens", len(ids), handle.kv_tokens),
        ("index of the first token", index, ready.index),
        ("first tokens", len(job.sequences), len(ready.first_ids)),
        ("blocks by group", [blocks] * len(ours), theirs),
        ("reserved blocks by group", [blocks] * len(theirs), ours),
    ):
        if here != there:
            return f"{what}: here {here}, in the handle {there}"
    return None


def pairs_of(handle: KvHandle, reserved: door.Reserved) -> tuple[BlockPair, ...]:
    """Blocks to copy: all but those that our own prefix index had."""
    skip = reserved.cached_blocks
    return tuple(
        BlockPair(group.group, remote, local, generation)
        for group, targets in zip(handle.groups, reserved.groups, strict=True)
        for remote, generation, local in zip(group.blocks[skip:], group.generations[skip:], targets[skip:], strict=True)
    )
