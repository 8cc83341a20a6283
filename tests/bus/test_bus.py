from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

import nats as nats_py
import pytest

from splitserve.bus.bus import Bus, NoResponders, RequestTimeout
from splitserve.errors import BusUnavailable, ConfigError, MessageTooLarge, NeverReady
from splitserve.protocol.codec import decode, encode
from splitserve.protocol.messages import (
    Cancel,
    FinAck,
    Message,
    Ping,
    Pong,
    Preempted,
    Refused,
    Release,
    Renew,
    RenewAnswer,
)
from splitserve.protocol.states import RefuseReason
from splitserve.protocol.trace import TraceContext
from support.servers import Server, free_port
from support.waiting import until

Connect = Callable[..., Awaitable[Bus]]


@pytest.fixture
async def connect() -> AsyncGenerator[Connect, None]:
    made: list[Bus] = []

    async def make(url: str, **more: Callable[[], None]) -> Bus:
        bus = await Bus.connect(url, name=f"test-{len(made)}", role="router", connect_timeout_s=10, **more)
        made.append(bus)
        return bus

    yield make
    for bus in made:
        await bus.close()


class Inbox:
    """Collects what a subscription delivers."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[tuple[Message, str | None]] = asyncio.Queue()

    def __call__(self, message: Message, reply_to: str | None) -> None:
        self.messages.put_nowait((message, reply_to))

    async def next(self) -> tuple[Message, str | None]:
        async with asyncio.timeout(30):
            return await self.messages.get()


async def asked_and_answered(a: Bus, b: Bus, subject: str, inbox: Inbox) -> None:
    """`a` asks, `b` hears it in `inbox` and answers, `a` has the answer."""
    asking = asyncio.create_task(a.request(subject, Ping(7), 30))
    message, reply_to = await inbox.next()
    assert message == Ping(7)
    assert reply_to
    await b.answer(reply_to, Pong(7))
    assert await asking == Pong(7)


async def test_messages_on_one_subject_arrive_in_order(shared_nats: Server, connect: Connect) -> None:
    a, b = await connect(shared_nats.url), await connect(shared_nats.url)
    inbox = Inbox()
    await b.subscribe("t.order", inbox)
    await b.flush(2)
    for n in range(200):
        await a.publish("t.order", Cancel("r", 1, n, 0, "x"))
    got = [(await inbox.next())[0] for _ in range(200)]
    assert [m.pa for m in got if isinstance(m, Cancel)] == list(range(200))


async def test_after_a_flush_the_server_knows_every_subscription(shared_nats: Server, connect: Connect) -> None:
    a, b = await connect(shared_nats.url), await connect(shared_nats.url)
    for n in range(300):  # nats-py's own flush leaves about one in a hundred behind
        await b.subscribe(f"t.known.{n}", Inbox())
        await b.flush(2)
        with pytest.raises(RequestTimeout):  # and not NoResponders
            await a.request(f"t.known.{n}", Ping(n), 0.001)


async def test_a_request_gets_its_answer(shared_nats: Server, connect: Connect) -> None:
    a, b = await connect(shared_nats.url), await connect(shared_nats.url)
    inbox = Inbox()
    await b.subscribe("t.ask", inbox)
    await b.flush(2)
    await asked_and_answered(a, b, "t.ask", inbox)


async def test_nobody_listening_is_known_at_once(shared_nats: Server, connect: Connect) -> None:
    bus = await connect(shared_nats.url)
    with pytest.raises(NoResponders):
        await bus.request("t.nobody", Ping(1), 30)


async def test_a_listener_that_never_answers_is_a_time_out(shared_nats: Server, connect: Connect) -> None:
    a, b = await connect(shared_nats.url), await connect(shared_nats.url)
    await b.subscribe("t.silent", Inbox())
    await b.flush(2)
    with pytest.raises(RequestTimeout, match=r"0\.05"):
        await a.request("t.silent", Ping(1), 0.05)


async def test_a_question_is_answered_once_however_many_answers_come(shared_nats: Server, connect: Connect) -> None:
    a, b = await connect(shared_nats.url), await connect(shared_nats.url)
    inbox, told = Inbox(), list[object]()
    await b.subscribe("t.twice", inbox)
    await b.flush(2)
    await a.ask("t.twice", Ping(1), 30, told.append)
    _, reply_to = await inbox.next()
    assert reply_to
    for n in (1, 2):
        await b.answer(reply_to, Pong(n))
    await asked_and_answered(a, b, "t.twice", inbox)  # its answer comes behind both
    assert told == [Pong(1)]


async def test_an_answer_that_comes_late_is_told_to_nobody(shared_nats: Server, connect: Connect) -> None:
    a, b = await connect(shared_nats.url), await connect(shared_nats.url)
    inbox, told = Inbox(), list[object]()
    await b.subscribe("t.late", inbox)
    await b.flush(2)
    await a.ask("t.late", Ping(1), 0.05, told.append)
    _, late_to = await inbox.next()
    await until(lambda: bool(told), "the time-out")
    assert late_to
    await b.answer(late_to, Pong(1))
    await asked_and_answered(a, b, "t.late", inbox)  # its answer comes behind the late one
    assert [type(answer) for answer in told] == [RequestTimeout]
    assert a.counters.errors == 0


async def test_who_waits_for_an_answer_hears_that_the_connection_is_closed(
    shared_nats: Server, connect: Connect
) -> None:
    a, b = await connect(shared_nats.url), await connect(shared_nats.url)
    await b.subscribe("t.silent", Inbox())
    await b.flush(2)
    asking = asyncio.create_task(a.request("t.silent", Ping(1), 30))
    await a.flush(2)
    await a.close()
    with pytest.raises(BusUnavailable, match="closed"):
        await asking


async def test_answers_to_a_publish_come_to_the_reply_handler(shared_nats: Server, connect: Connect) -> None:
    a, b = await connect(shared_nats.url), await connect(shared_nats.url)
    asked, replies = Inbox(), Inbox()
    await b.subscribe("t.renew", asked)
    await a.receive_replies(replies)
    await b.flush(2)
    await a.flush(2)
    await a.publish("t.renew", Renew(("h1", "h2")), reply=True)
    _, reply_to = await asked.next()
    assert reply_to
    await b.answer(reply_to, RenewAnswer(("h2",)))
    assert (await replies.next())[0] == RenewAnswer(("h2",))


async def test_a_message_over_the_servers_limit_names_both_sizes_and_is_not_sent(
    shared_nats: Server, connect: Connect
) -> None:
    bus = await connect(shared_nats.url)
    with pytest.raises(MessageTooLarge, match=rf"\d{{8}} bytes .* {bus.max_payload}"):
        await bus.publish("t.big", FinAck("r", 1, tuple(range(3_000_000))))
    await bus.flush(2)
    assert bus.connected


async def test_an_unreadable_message_is_answered_and_counted(shared_nats: Server, connect: Connect) -> None:
    bus = await connect(shared_nats.url)
    await bus.subscribe("t.garbage", Inbox())
    await bus.flush(2)
    raw = await nats_py.connect(shared_nats.url)
    try:
        answer = decode((await raw.request("t.garbage", b"\x00nonsense", timeout=5)).data)
    finally:
        await raw.close()
    assert isinstance(answer, Refused)
    assert answer.reason is RefuseReason.UNREADABLE
    assert bus.counters.unreadable == 1


async def test_while_the_server_is_away_nothing_is_buffered_and_it_is_noticed_when_it_is_back(
    own_nats: Server, connect: Connect
) -> None:
    own_nats.start()
    down, up = asyncio.Event(), asyncio.Event()
    bus = await connect(own_nats.url, on_down=down.set, on_up=up.set)
    inbox = Inbox()
    await bus.subscribe("t.back", inbox)
    await bus.flush(2)
    own_nats.kill()
    await asyncio.wait_for(down.wait(), 30)
    with pytest.raises(BusUnavailable):
        await bus.publish("t.back", Ping(1))
    with pytest.raises(BusUnavailable):
        await bus.request("t.back", Ping(1), 1)
    own_nats.start()
    await asyncio.wait_for(up.wait(), 30)
    await bus.publish("t.back", Ping(2))
    assert (await inbox.next())[0] == Ping(2)
    assert bus.counters.reconnects == 1


async def test_a_frozen_server_is_noticed_in_seconds(own_nats: Server, connect: Connect) -> None:
    own_nats.start()
    down = asyncio.Event()
    await connect(own_nats.url, on_down=down.set)
    own_nats.freeze()
    await asyncio.wait_for(down.wait(), 15)


async def test_a_server_that_comes_late_is_waited_for(own_nats: Server, connect: Connect) -> None:
    connecting = asyncio.ensure_future(connect(own_nats.url))
    await asyncio.sleep(0)
    own_nats.start()
    assert (await connecting).connected


async def test_a_server_that_never_comes_is_one_clear_error() -> None:
    with pytest.raises(NeverReady, match=r"did not answer in 0.3 s.*--nats"):
        await Bus.connect(f"nats://u:hidden@127.0.0.1:{free_port()}", name="t", role="r", connect_timeout_s=0.3)


async def test_a_malformed_url_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="refuses"):
        await Bus.connect("nats://127.0.0.1:notaport", name="t", role="r", connect_timeout_s=1)


async def test_a_trace_travels_in_the_headers_of_publish_request_and_answer(
    shared_nats: Server, connect: Connect
) -> None:
    a, b = await connect(shared_nats.url), await connect(shared_nats.url)
    trace = TraceContext(f"00-{'ab' * 16}-{'cd' * 8}-01", "vendor=1")
    inbox = Inbox()
    await b.subscribe("t.trace", inbox)
    await b.flush(2)
    await a.publish("t.trace", Cancel("r", 1, 1, 0, "x", trace))
    assert (await inbox.next())[0] == Cancel("r", 1, 1, 0, "x", trace)
    asking = asyncio.create_task(a.request("t.trace", Release("h", "t", trace), 5))
    message, reply_to = await inbox.next()
    assert message == Release("h", "t", trace)
    await b.answer(reply_to or "", Preempted("r", "w", 1, trace))
    assert await asking == Preempted("r", "w", 1, trace)


async def test_a_malformed_trace_header_costs_its_message_nothing(shared_nats: Server, connect: Connect) -> None:
    b = await connect(shared_nats.url)
    inbox = Inbox()
    await b.subscribe("t.trace.bad", inbox)
    await b.flush(2)
    raw = await nats_py.connect(shared_nats.url)
    try:
        headers = {"traceparent": "nonsense", "tracestate": "a=1", "other": "x"}
        await raw.publish("t.trace.bad", encode(Cancel("r", 1, 1, 0, "x")), headers=headers)
        assert (await inbox.next())[0] == Cancel("r", 1, 1, 0, "x")
    finally:
        await raw.close()
