"""What the network does to one message: the delays of its copies. None is a loss, two are a double."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from random import Random

from splitserve.protocol.messages import Beat, Message


class MessageFault(StrEnum):
    DROP = "drop"
    DOUBLE = "double"  # the second copy comes late, overtaken by what was sent after it
    DELAY = "delay"  # what the sender says on this subject afterwards waits behind it


@dataclass(frozen=True, slots=True)
class Network:
    """How the bus treats messages at random. Times in seconds, (least, most)."""

    latency: tuple[float, float] = (0.0002, 0.001)
    drop: float = 0.0
    double: float = 0.0
    delay: float = 0.0
    late: tuple[float, float] = (0.01, 3.0)
    only: frozenset[str] = frozenset()  # kinds that are hurt; empty: all


@dataclass(frozen=True, slots=True)
class SingleFault:
    """A fault at the `number`-th message (beats are not counted)."""

    number: int
    fault: MessageFault
    late: float = 1.3


class MessageFaults:
    """Decides each message's fate, in sending order, from the seed alone."""

    def __init__(self, rng: Random, network: Network, singles: Iterable[SingleFault] = ()) -> None:
        self._random = rng.random
        self._network = network
        self._singles = {single.number: single for single in singles}
        self._faulty = network.drop + network.double + network.delay
        self.counted = 0  # messages so far, beats apart

    def copies(self, message: Message) -> tuple[tuple[float, ...], MessageFault | None]:
        """Delays of the copies in seconds, and the fault if there was one."""
        low, high = self._network.latency
        latency = low + (high - low) * self._random()
        if type(message) is not Beat:
            self.counted += 1
            single = self._singles.get(self.counted)
            if single is not None:
                return self._hurt(latency, single.fault, single.late)
        only = self._network.only
        if not self._faulty or (only and type(message).__name__ not in only):
            return (latency,), None
        dice = self._random()
        if dice >= self._faulty:
            return (latency,), None
        fault = self._pick(dice)
        low, high = self._network.late
        return self._hurt(latency, fault, low + (high - low) * self._random() ** 2)

    def become(self, network: Network) -> None:
        """From now on the network is this one."""
        self._network, self._faulty = network, network.drop + network.double + network.delay

    def _pick(self, dice: float) -> MessageFault:
        if dice < self._network.drop:
            return MessageFault.DROP
        if dice < self._network.drop + self._network.double:
            return MessageFault.DOUBLE
        return MessageFault.DELAY

    @staticmethod
    def _hurt(latency: float, fault: MessageFault, late: float) -> tuple[tuple[float, ...], MessageFault]:
        if fault is MessageFault.DROP:
            return (), fault
        if fault is MessageFault.DOUBLE:
            return (latency, latency + late), fault
        return (latency + late,), fault
