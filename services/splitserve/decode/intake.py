"""What of one job's KV is readable at its owner, on its way, and here. Decides only.

The final handle decides what counts: a block that was copied while the prompt was still computed is used only if that
handle names it under the same generation. So whatever became of an early copy, a failed one too, it costs at most time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from splitserve.engine import door
from splitserve.kv.transfer.base import BlockPair
from splitserve.protocol.handle import KvHandle
from splitserve.protocol.messages import KvReady

Place = tuple[int, int]  # (group, position of the block in it)
Named = tuple[int, int]  # (block at the owner, its generation)


@dataclass(slots=True)
class Intake:
    """`handle` is the last one heard of."""

    handle: KvHandle | None = None
    bytes: int = 0  # copied so far
    blocks: int = 0
    _readable: list[tuple[Place, Named]] = field(default_factory=list[tuple[Place, Named]])  # and not asked for yet
    _here: dict[Place, Named] = field(default_factory=dict[Place, Named])  # or on their way
    _under_way: tuple[Place, ...] | None = None
    _failed: bool = False

    @property
    def under_way(self) -> bool:
        """Whether a copy writes our blocks."""
        return self._under_way is not None

    def offer(self, ready: KvReady, block_tokens: int) -> None:
        """Blocks became readable. Those of an early message end at `tokens_ready`; the final one names all."""
        self.handle = ready.handle
        if ready.final:
            self._readable.clear()
        for group in ready.handle.groups:
            first = 0 if ready.final else ready.tokens_ready // block_tokens - len(group.blocks)
            named = zip(group.blocks, group.generations, strict=True)
            self._readable.extend(((group.group, at), block) for at, block in enumerate(named, first))

    def next_pairs(self, reserved: door.Reserved, *, final: bool) -> tuple[BlockPair, ...]:
        """What is to be copied now, in order: all that is readable and neither cached here nor copied. Under way from now
        on, if it is anything or `final`."""
        if self._failed and not final:
            return ()
        skip, targets = reserved.cached_blocks, reserved.groups
        places: list[Place] = []
        pairs: list[BlockPair] = []
        for place, named in self._readable:
            group, at = place
            if group < len(targets) and skip <= at < len(targets[group]) and self._here.get(place) != named:
                self._here[place] = named
                places.append(place)
                pairs.append(BlockPair(group, named[0], targets[group][at], named[1]))
        self._readable.clear()
        if pairs or final:
            self._under_way = tuple(places)
        return tuple(pairs)

    def arrived(self, size: int, blocks: int) -> None:
        """The copy under way has ended well."""
        self._under_way = None
        self.bytes += size
        self.blocks += blocks

    def abandon(self) -> None:
        """The job is over: what the copy under way brings is nobody's."""
        self._under_way = None

    def failed(self) -> None:
        """It has not: its blocks are asked for again with the final handle, and no others before."""
        for place in self._under_way or ():
            del self._here[place]
        self._under_way, self._failed = None, True
