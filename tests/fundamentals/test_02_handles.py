"""**The handle and its lease.** A prompt is read in one process and answered in another. What passes between them is a
handle: it says where the prompt's blocks lie and proves what is in them. While the reader copies, the owner keeps the
blocks under a lease. Time is the owner's own clock, given as `now`: nobody has to agree on what time it is.
"""

from __future__ import annotations

from splitserve.kv.lease import LeaseTable
from splitserve.kv.pool import BlockPool
from splitserve.protocol.codec import decode, encode
from splitserve.protocol.handle import GroupBlocks
from splitserve.protocol.messages import KvReady
from support.worker_cores import handle, kv_ready

HELD = (GroupBlocks(group=0, blocks=(4, 5), generations=(1, 1)),)


def test_a_handle_names_blocks_and_generations_and_no_time_and_no_tensor() -> None:
    made = handle(ids=tuple(range(10)))
    (group,) = made.groups
    assert len(group.blocks) == len(group.generations) == 3  # ten tokens in blocks of four
    assert made.ttl_s == 15  # how long it will be held, not until when
    assert len(encode(kv_ready())) < 1000  # a message, whatever the model's size


def test_a_message_is_the_same_on_both_sides_of_the_bus() -> None:
    message = kv_ready(ids=tuple(range(10)))
    assert isinstance(message, KvReady)
    assert decode(encode(message)) == message


def test_a_lease_ends_by_release_and_only_the_handles_own_token_releases_it() -> None:
    leases = LeaseTable()
    leases.grant("handle", "job", token="secret", groups=HELD, ttl_s=15, now=0)
    assert not leases.release("handle", token="guessed")
    assert leases.release("handle", token="secret")
    assert leases.expire(now=0) == ["job"]  # its blocks may be freed: said exactly once
    assert leases.expire(now=99) == []


def test_a_reader_that_died_holds_nothing_for_longer_than_the_lease() -> None:
    leases = LeaseTable()
    leases.grant("handle", "job", token="secret", groups=HELD, ttl_s=15, now=0)
    assert leases.renew(["handle"], now=10) == ()
    assert leases.expire(now=24.9) == []
    assert leases.expire(now=25) == ["job"]
    assert leases.renew(["handle"], now=25) == ("handle",)  # unknown: stop renewing it


def test_a_reader_that_slept_past_the_lease_sees_that_the_content_is_gone() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    assert blocks is not None
    named = pool.generations(blocks)  # what stands in the handle
    pool.fill(blocks)
    pool.free(blocks)  # the lease ended
    assert pool.generations(blocks) == named  # nothing was written yet: reading it late is no mistake
    pool.allocate(1)
    assert pool.generations(blocks) != named  # "fenced": the prompt is read again
