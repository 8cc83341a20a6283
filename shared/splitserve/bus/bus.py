"""The bus: NATS Core, and the only `nats.connect` of the project.

nats-py's defaults are wrong for a control plane (protocol §3): it gives up for good after two minutes, notices a dead
server after four, and silently buffers stale jobs while disconnected. The settings below are the measured ones.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import nats
import nats.errors
from nats.aio.client import NO_RESPONDERS_STATUS, Client
from nats.aio.msg import Msg
from nats.js.api import Header

from splitserve.config import redacted
from splitserve.errors import BusUnavailable, ConfigError, MessageTooLarge, NeverReady, ProtocolError
from splitserve.protocol.codec import decode, encode, headers_of
from splitserve.protocol.messages import Message, Refused
from splitserve.protocol.states import RefuseReason

log = logging.getLogger("splitserve.bus")

Handler = Callable[[Message, str | None], None]
Told = Callable[[Message | BusUnavailable | ProtocolError], None]  # of an answer, or of what there is instead
CLOSE_S = 2.0
PENDING_BYTES = 128 << 20  # a subscription's backlog; beyond, nats-py drops and `errors` counts: Resume heals


async def flush(client: Client, timeout_s: float) -> None:
    """Wait until the server has everything that `client` sent so far, subscriptions too.

    nats-py's own flush writes its ping past what its flusher task still holds: the second goes behind that.
    """
    for _ in range(2):
        await client.flush(timeout=timeout_s)  # type: ignore[arg-type]


class NoResponders(BusUnavailable):
    """The bus knows of nobody who listens on that subject."""


class RequestTimeout(BusUnavailable):
    """Nobody answered in time."""


@dataclass(slots=True)
class BusCounters:
    """What went wrong on one connection, for metrics."""

    errors: int = 0
    unreadable: int = 0
    reconnects: int = 0


@dataclass(frozen=True, slots=True)
class _Question:
    """Asked, and neither answered nor late yet."""

    subject: str
    told: Told
    timer: asyncio.TimerHandle


@dataclass(slots=True)
class Bus:
    """One connection. `on_down` and `on_up` are called from the event loop, on_up after subscriptions are back.

    Every coroutine raises BusUnavailable while the connection is down (nothing is buffered), and MessageTooLarge, naming
    both sizes, for a message over the server's max_payload.
    """

    name: str
    on_down: Callable[[], None] = lambda: None
    on_up: Callable[[], None] = lambda: None
    counters: BusCounters = field(default_factory=BusCounters)
    _client: Client = field(default_factory=Client)
    _inbox: str = ""
    _asked: int = 0  # numbers of questions: the last part of the subject that their answers come on
    _open: dict[str, _Question] = field(default_factory=dict[str, _Question])  # by that subject
    _closing: bool = False

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        name: str,
        role: str,
        connect_timeout_s: float,
        on_down: Callable[[], None] = lambda: None,
        on_up: Callable[[], None] = lambda: None,
    ) -> Bus:
        """Connect, waiting for a server that is not there yet.

        Raises NeverReady after `connect_timeout_s`, ConfigError for wrong credentials or a malformed URL.
        """
        bus = cls(name, on_down, on_up)
        try:
            async with asyncio.timeout(connect_timeout_s):
                await bus._client.connect(
                    url,
                    name=name,
                    inbox_prefix=f"_INBOX_{role}",
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=0.2,  # type: ignore[arg-type]  # a float works; the annotation is too narrow
                    connect_timeout=2,
                    ping_interval=2,
                    max_outstanding_pings=2,
                    pending_size=0,
                    error_cb=bus._on_error,
                    disconnected_cb=bus._on_disconnected,
                    reconnected_cb=bus._on_reconnected,
                )
                bus._inbox = bus._client.new_inbox()
                await bus._listen(f"{bus._inbox}.*", bus._on_answer)
        except TimeoutError as error:
            await bus.close()
            why = f" ({bus._client.last_error})" if bus._client.last_error else ""
            raise NeverReady(
                f"NATS at {redacted(url)} did not answer in {connect_timeout_s:g} s{why}: start it, or correct --nats"
            ) from error
        except (nats.errors.Error, ValueError, OSError) as error:
            raise ConfigError(f"NATS at {redacted(url)} refuses the connection: {error}") from error
        return bus

    @property
    def connected(self) -> bool:
        return self._client.is_connected

    @property
    def max_payload(self) -> int:
        return self._client.max_payload

    async def publish(self, subject: str, message: Message, *, reply: bool = False) -> None:
        """Send and forget. With `reply`, answers go to the handler given to `receive_replies`."""
        data, headers = self._checked(message)
        try:
            await self._client.publish(subject, data, reply=self._inbox if reply else "", headers=headers)
        except (nats.errors.Error, OSError) as error:
            raise BusUnavailable(f"the bus is away: {error or type(error).__name__}") from error

    async def ask(self, subject: str, message: Message, timeout_s: float, told: Told) -> None:
        """Send, and have `told` called once: with the answer, NoResponders, RequestTimeout, BusUnavailable when the
        connection is closed first, or a ProtocolError for an answer that cannot be read. Nobody waits for it meanwhile:
        nats-py's own way, a future and a time-out for each, cost a router more than what is asked. What this raises is
        not told.
        """
        data, headers = self._checked(message)
        self._asked += 1
        reply = f"{self._inbox}.{self._asked}"
        late = RequestTimeout(f"no answer on {subject} in {timeout_s:g} s")
        timer = asyncio.get_running_loop().call_later(timeout_s, self._end, reply, late)
        self._open[reply] = _Question(subject, told, timer)
        try:
            await self._client.publish(subject, data, reply=reply, headers=headers)
        except (nats.errors.Error, OSError) as error:
            timer.cancel()
            self._open.pop(reply, None)
            raise BusUnavailable(f"the bus is away: {error or type(error).__name__}") from error

    async def request(self, subject: str, message: Message, timeout_s: float) -> Message:
        """`ask`, and wait for the answer. Raises what is told instead of one."""
        heard: asyncio.Future[Message | BusUnavailable | ProtocolError] = asyncio.get_running_loop().create_future()

        def told(answer: Message | BusUnavailable | ProtocolError) -> None:
            if not heard.done():
                heard.set_result(answer)

        await self.ask(subject, message, timeout_s, told)
        answer = await heard
        if isinstance(answer, BusUnavailable | ProtocolError):
            raise answer
        return answer

    async def answer(self, reply_to: str, message: Message) -> None:
        """Answer a message that had a reply subject."""
        await self.publish(reply_to, message)

    async def subscribe(self, subject: str, handler: Handler) -> None:
        """Call `handler(message, reply_to)` for each message. It must only enqueue: nats-py runs handlers one by one."""

        async def on_message(raw: Msg) -> None:
            try:
                message = decode(raw.data, raw.headers)
            except ProtocolError as error:
                await self._refuse(raw, error)
                return
            handler(message, raw.reply or None)

        await self._listen(subject, on_message)

    async def receive_replies(self, handler: Handler) -> None:
        """Where answers to `publish(reply=True)` go."""
        await self.subscribe(self._inbox, handler)

    async def flush(self, timeout_s: float) -> None:
        """Wait until the server has everything sent so far."""
        try:
            await flush(self._client, timeout_s)
        except (nats.errors.Error, OSError) as error:
            raise BusUnavailable(f"the bus is away: {error or type(error).__name__}") from error

    async def close(self) -> None:
        """Disconnect. A server that does not take the last bytes in `CLOSE_S` is left: nats-py would wait for it."""
        self._closing = True
        for reply in list(self._open):
            self._end(reply, BusUnavailable("the bus is away: closed"))
        closing = asyncio.create_task(self._client.close(), name=f"close-{self.name}")
        _, late = await asyncio.wait({closing}, timeout=CLOSE_S)
        for task in late:
            task.cancel()
        writer = getattr(self._client._transport, "_io_writer", None)  # pyright: ignore[reportPrivateUsage]
        if late and writer is not None:
            writer.transport.abort()
        reconnecting = self._client._reconnection_task  # pyright: ignore[reportPrivateUsage]  # outlives nats-py's close
        if reconnecting is not None and not reconnecting.done():
            reconnecting.cancel()
            await asyncio.wait({reconnecting}, timeout=CLOSE_S)

    def _checked(self, message: Message) -> tuple[bytes, dict[str, str] | None]:
        if not self._client.is_connected:
            raise BusUnavailable("the bus is away: not connected")
        data, headers = encode(message), headers_of(message)
        size = len(data) + _header_bytes(headers)
        if size > self._client.max_payload:
            raise MessageTooLarge(
                f"a {type(message).__name__} of {size} bytes is over the bus's limit of "
                f"{self._client.max_payload}: send a shorter prompt, or raise max_payload of the NATS server"
            )
        return data, headers

    async def _listen(self, subject: str, heard: Callable[[Msg], Awaitable[None]]) -> None:
        await self._client.subscribe(subject, cb=heard, pending_msgs_limit=0, pending_bytes_limit=PENDING_BYTES)

    async def _on_answer(self, raw: Msg) -> None:
        question = self._open.get(raw.subject)
        if question is None:  # late, or a double
            return
        headers = raw.headers
        if headers is not None and headers.get(Header.STATUS) == NO_RESPONDERS_STATUS:
            self._end(raw.subject, NoResponders(f"nobody listens on {question.subject}"))
            return
        try:
            answer = decode(raw.data, headers)
        except ProtocolError as error:
            self._end(raw.subject, error)
        else:
            self._end(raw.subject, answer)

    def _end(self, reply: str, answer: Message | BusUnavailable | ProtocolError) -> None:
        question = self._open.pop(reply)
        question.timer.cancel()
        question.told(answer)

    async def _refuse(self, raw: Msg, error: ProtocolError) -> None:
        self.counters.unreadable += 1
        log.warning("unreadable message", extra={"subject": raw.subject, "error": error.message})
        if raw.reply:
            await self._client.publish(raw.reply, encode(Refused(RefuseReason.UNREADABLE, error.message)))

    async def _on_error(self, error: Exception) -> None:
        self.counters.errors += 1
        log.warning("bus error", extra={"connection": self.name, "error": str(error) or type(error).__name__})

    async def _on_disconnected(self) -> None:
        if self._closing:
            return
        log.warning("bus down", extra={"connection": self.name})
        self.on_down()

    async def _on_reconnected(self) -> None:
        self.counters.reconnects += 1
        log.warning("bus up", extra={"connection": self.name})
        self.on_up()


def _header_bytes(headers: Mapping[str, str] | None) -> int:
    """The block that nats-py writes before the data: `NATS/1.0`, a line a header, an empty line. It counts as payload."""
    return 12 + sum(len(name) + len(value) + 4 for name, value in headers.items()) if headers else 0
