"""A handle and a reservation: what must agree before a byte is copied."""

from __future__ import annotations

from collections.abc import Sequence

from splitserve.decode.job import Job
from splitserve.engine import door
from splitserve.kv.prefix import block_hashes, chain_seed
from splitserve.protocol.messages import KvReady


def prompt_ids(job: Job) -> tuple[int, ...]:
    """What the handle must cover: with one sequence its delivered tokens are read with the prompt."""
    asked = job.asked
    return asked.ids + asked.outputs[0] if len(asked.outputs) == 1 else asked.ids


def chain_hashes(ids: Sequence[int], block_tokens: int, fingerprint: str, cache_salt: str) -> tuple[bytes, ...]:
    """Of each full block."""
    return tuple(block_hashes(ids, block_tokens, chain_seed(fingerprint, cache_salt=cache_salt)))


def proof(hashes: Sequence[bytes], blocks: int) -> str:
    """What a handle over so many full blocks says; "" when there are none."""
    return hashes[blocks - 1].hex() if blocks else ""


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


def readable(job: Job, ready: KvReady, block_tokens: int) -> bool:
    """Whether an early message names blocks of this job's tokens. One that does not is no error: the final one decides."""
    full = ready.tokens_ready // block_tokens
    handle = ready.handle
    return (
        ready.tokens_ready == handle.kv_tokens == full * block_tokens
        and 0 < full <= len(job.hashes)
        and proof(job.hashes, full) == handle.chain_hash
        and all(len(group.blocks) <= full for group in handle.groups)
    )
