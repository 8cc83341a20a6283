"""The simulator's own parts: a bus that keeps its promises and breaks them only when told to."""

from __future__ import annotations

from random import Random

from simulation.bus import Bus, Connection
from simulation.clock import Clock
from simulation.faults import MessageFault, MessageFaults, Network, SingleFault
from simulation.journal import Journal
from splitserve.protocol.effects import NoAnswer
from splitserve.protocol.messages import Message, Ping, Pong


class Wire:
    """Two connections on one bus; `heard` is what the second got."""

    def __init__(self, network: Network | None = None, *singles: SingleFault) -> None:
        self.clock = Clock()
        faults = MessageFaults(Random(1), network or Network(), singles)
        self.bus = Bus(self.clock, faults, Journal(), "ss1.t.hb.>")
        self.one, self.two = Connection("one"), Connection("two")
        self.heard: list[int] = []
        self.bus.subscribe(self.two, "s", self._hear)

    def _hear(self, message: Message, reply_to: str | None) -> None:
        assert isinstance(message, Ping)
        self.heard.append(message.incarnation)
        if reply_to is not None:
            self.bus.answer(self.two, reply_to, Pong(message.incarnation))

    def say(self, *numbers: int) -> None:
        for number in numbers:
            self.bus.publish(self.one, "s", Ping(number))


def test_one_sender_is_heard_in_order_even_behind_a_delay() -> None:
    wire = Wire(Network(delay=0.3, latency=(0.0, 0.5)))
    wire.say(*range(50))
    wire.clock.run(60)
    assert wire.heard == list(range(50))


def test_the_second_copy_of_a_double_comes_late_and_holds_up_nothing() -> None:
    wire = Wire(None, SingleFault(1, MessageFault.DOUBLE))
    wire.say(1, 2)
    wire.clock.run(60)
    assert wire.heard == [1, 2, 1]


def test_a_dropped_message_is_the_only_one_that_is_missing() -> None:
    wire = Wire(None, SingleFault(2, MessageFault.DROP))
    wire.say(1, 2, 3)
    wire.clock.run(60)
    assert wire.heard == [1, 3]


def test_a_question_is_answered_and_one_to_nobody_hears_so() -> None:
    wire = Wire()
    answers: list[Message | NoAnswer] = []
    wire.bus.publish(wire.one, "s", Ping(7), wire.bus.inbox(wire.one, answers.append))
    wire.bus.publish(wire.one, "elsewhere", Ping(8), wire.bus.inbox(wire.one, answers.append))
    wire.clock.run(1)
    assert sorted(map(repr, answers)) == sorted(map(repr, (Pong(7), NoAnswer.NO_RESPONDERS)))


def test_what_a_silent_line_holds_comes_late_and_is_lost_when_it_breaks() -> None:
    wire = Wire()
    wire.bus.hush(wire.two)
    wire.say(1)
    wire.clock.run(1)
    wire.bus.mend(wire.two)
    assert wire.heard == [1]
    wire.bus.hush(wire.one)
    wire.say(2)
    wire.bus.cut(wire.one)
    wire.bus.mend(wire.one)
    wire.clock.run(2)
    assert wire.heard == [1]


def test_a_closed_connection_responds_no_more() -> None:
    wire = Wire()
    wire.bus.close(wire.two)
    answers: list[Message | NoAnswer] = []
    wire.bus.publish(wire.one, "s", Ping(7), wire.bus.inbox(wire.one, answers.append))
    wire.clock.run(1)
    assert answers == [NoAnswer.NO_RESPONDERS]
