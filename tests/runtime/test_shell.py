"""The shell on a real bus, round a core that does as it is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from splitserve.bus.bus import Bus
from splitserve.faultpoints import Faults
from splitserve.protocol.effects import (
    Answer,
    Answered,
    Ask,
    Drain,
    NoAnswer,
    Publish,
    Received,
    Tick,
    Unanswered,
)
from splitserve.protocol.messages import Beat, Cancel, Message, Ping, Pong, TokenFrame
from splitserve.runtime.shell import Shell, Watch
from support.servers import Server
from support.waiting import until

CANCEL = Cancel("a", 1, 1, 1, "test")


@dataclass(frozen=True)
class Do:
    """Event: answer with these commands."""

    commands: tuple[Any, ...]


@dataclass(frozen=True)
class Note:
    """Command of the role's own."""

    text: str


class Puppet:
    """A core that remembers its events."""

    def __init__(self) -> None:
        self.events: list[object] = []
        self.idle = False
        self.at: float | None = None

    def handle(self, event: object, now: float) -> list[Any]:
        self.events.append(event)
        if isinstance(event, Tick):
            self.at = None
        if event == "raise":
            raise RuntimeError("told to raise")
        return list(event.commands) if isinstance(event, Do) else []

    def wake_at(self) -> float | None:
        return self.at

    def beat(self, now: float, step_age_ms: int = 0, bus_lag_ms: int = 0) -> Beat:
        return Beat("w", "decode", 1)

    def heard(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@dataclass
class Stage:
    core: Puppet
    shell: Shell
    bus: Bus
    notes: list[str]
    task: asyncio.Task[None]

    def do(self, *commands: Any) -> None:
        self.shell.put(Do(commands))

    async def told(self, kind: type[Any]) -> Any:
        await until(lambda: bool(self.core.heard(kind)), f"a {kind.__name__}")
        return self.core.heard(kind)[0]


@asynccontextmanager
async def stage(url: str, faults: str = "", watch: Watch | None = None) -> AsyncGenerator[Stage]:
    bus = await Bus.connect(url, name="w", role="decode", connect_timeout_s=10)
    core, notes = Puppet(), list[str]()
    act: Callable[[Any], None] = lambda note: notes.append(note.text)  # noqa: E731
    shell = Shell(core, bus, {Note: act}, Faults(faults), watch)
    made = Stage(core, shell, bus, notes, asyncio.create_task(shell.run()))
    await bus.subscribe("t.w", shell.receive)
    await bus.receive_replies(shell.receive)
    await bus.flush(5)
    try:
        yield made
    finally:
        made.task.cancel()
        await asyncio.gather(made.task, return_exceptions=True)
        await bus.close()


async def test_messages_become_events_and_answers_go_back(shared_nats: Server) -> None:
    async with stage(shared_nats.url) as made:
        asked = asyncio.create_task(made.bus.request("t.w", Ping(1), 5))
        received: Received = await made.told(Received)
        assert received.message == Ping(1)
        assert received.reply_to is not None
        made.do(Answer(received.reply_to, Pong(1)))
        assert await asked == Pong(1)


async def test_commands_are_carried_out_in_order(shared_nats: Server) -> None:
    async with stage(shared_nats.url) as made:
        made.do(Note("a"), Publish("t.w", CANCEL), Note("b"))
        made.do(Note("c"))
        assert (await made.told(Received)).message == CANCEL
        assert made.notes == ["a", "b", "c"]


async def test_a_publish_that_welcomes_an_answer_gets_it_as_an_event(shared_nats: Server) -> None:
    async with stage(shared_nats.url) as made:
        made.do(Publish("t.w", Ping(1), reply=True))
        received: Received = await made.told(Received)
        assert received.reply_to is not None
        made.core.events.clear()
        made.do(Answer(received.reply_to, Pong(7)))
        assert (await made.told(Received)).message == Pong(7)


async def test_a_question_ends_in_exactly_one_event(shared_nats: Server) -> None:
    async with stage(shared_nats.url) as made:
        made.do(
            Ask("t.nobody", Ping(1), 1.0, "nobody"), Ask("t.w", Ping(1), 0.05, "silent"), Ask("t.w", Ping(2), 5, "ok")
        )
        await until(lambda: len(made.core.heard(Received)) == 2, "both questions")
        for received in made.core.heard(Received):
            if received.message == Ping(2):
                made.do(Answer(received.reply_to, Pong(2)))
        await until(lambda: len(made.core.heard(Unanswered)) == 2, "two ends without an answer")
        assert {(event.tag, event.why) for event in made.core.heard(Unanswered)} == {
            ("nobody", NoAnswer.NO_RESPONDERS),
            ("silent", NoAnswer.TIMEOUT),
        }
        assert await made.told(Answered) == Answered("ok", Pong(2))


async def test_while_the_bus_is_away_messages_are_lost_and_questions_end_at_once(own_nats: Server) -> None:
    own_nats.start()
    async with stage(own_nats.url) as made:
        own_nats.kill()
        await until(lambda: not made.bus.connected, "the connection is seen to be lost")
        made.do(Publish("t.w", CANCEL), Ask("t.w", Ping(1), 5, "away"), Note("still here"))
        assert await made.told(Unanswered) == Unanswered("away", NoAnswer.DISCONNECTED)
        assert made.notes == ["still here"]
        assert made.core.heard(Received) == []


async def test_a_message_over_the_servers_limit_is_logged_and_costs_no_other(shared_nats: Server, caplog: Any) -> None:
    async with stage(shared_nats.url) as made:
        huge = TokenFrame("w", 1, 1, (0,), (1,), (0,), (1,), (0,), tuple(range(3_000_000)))
        made.do(Publish("t.w", huge), Publish("t.w", CANCEL))
        assert (await made.told(Received)).message == CANCEL
        assert "message not sent" in caplog.text


async def test_a_tick_comes_when_the_core_wants_to_be_woken_and_not_before(shared_nats: Server) -> None:
    async with stage(shared_nats.url) as made:
        loop = asyncio.get_running_loop()
        made.core.at = loop.time() + 0.1
        asked_for = made.core.at
        made.do()
        await made.told(Tick)
        assert loop.time() >= asked_for
        assert len(made.core.heard(Tick)) == 1


async def test_ticks_and_others_get_their_turn_while_events_never_end(shared_nats: Server) -> None:
    async with stage(shared_nats.url) as made:

        def busy(note: Note) -> None:
            time.sleep(0.002)
            made.shell.put(Do((note,)))  # the queue is never empty

        made.shell._acts = {Note: busy}  # pyright: ignore[reportPrivateUsage]
        made.core.at = asyncio.get_running_loop().time() + 0.1
        made.do(Note("again"))
        await made.told(Tick)  # it sleeps in the same loop
        assert not made.task.done()


async def test_a_sooner_wish_replaces_a_later_one(shared_nats: Server) -> None:
    async with stage(shared_nats.url) as made:
        loop = asyncio.get_running_loop()
        made.core.at = loop.time() + 3600
        made.do()
        await until(lambda: len(made.core.events) == 1, "the first event")
        made.core.at = loop.time() + 0.01
        made.do()
        await made.told(Tick)


async def test_an_event_whose_handling_raises_costs_no_other(shared_nats: Server, caplog: Any) -> None:
    async with stage(shared_nats.url) as made:
        made.shell.put("raise")
        made.do(Note("after"))
        await until(lambda: made.notes == ["after"], "the next event")
        assert "told to raise" in caplog.text


async def test_drained_means_told_to_and_idle(shared_nats: Server) -> None:
    async with stage(shared_nats.url) as made:
        made.core.idle = True
        made.do(Note("not yet told"))
        await until(lambda: len(made.notes) == 1, "the event")
        assert not made.shell.drained.is_set()
        made.core.idle = False
        made.shell.put(Drain())
        made.do(Note("not yet idle"))
        await until(lambda: len(made.notes) == 2, "the event")
        assert not made.shell.drained.is_set()
        made.core.idle = True
        made.do()
        await asyncio.wait_for(made.shell.drained.wait(), 5)


async def test_a_fault_drops_the_nth_frame(shared_nats: Server) -> None:
    def frame(seq: int) -> Message:
        return TokenFrame("w", 1, seq, (0,), (1,), (0,), (1,), (0,), (5,))

    async with stage(shared_nats.url, "worker.drop_frame:2") as made:
        made.do(*(Publish("t.w", frame(seq)) for seq in (1, 2, 3)), Publish("t.w", CANCEL))
        await until(lambda: any(event.message == CANCEL for event in made.core.heard(Received)), "the last message")
        assert [e.message.stream_seq for e in made.core.heard(Received) if isinstance(e.message, TokenFrame)] == [1, 3]


async def test_who_looks_on_sees_each_event_with_its_commands_and_can_break_nothing(shared_nats: Server) -> None:
    seen: list[tuple[object, Sequence[object]]] = []

    def watch(event: object, commands: Sequence[object], now: float) -> None:
        seen.append((event, commands))
        raise RuntimeError("told to raise")

    async with stage(shared_nats.url, watch=watch) as made:
        made.do(Note("one"))
        made.do(Note("two"))
        await until(lambda: made.notes == ["one", "two"], "both commands")
        assert seen[0] == (Do((Note("one"),)), [Note("one")])
