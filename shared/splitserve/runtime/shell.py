"""Round a core: its events in one queue, its commands carried out in order, its timer. Decides nothing."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from splitserve.bus.bus import Bus, NoResponders, RequestTimeout
from splitserve.errors import BusUnavailable, MessageTooLarge, ProtocolError
from splitserve.faultpoints import Faults
from splitserve.protocol.effects import Answer, Answered, Ask, Drain, NoAnswer, Publish, Received, Tick, Unanswered
from splitserve.protocol.messages import KvReady, Message, Refused, TokenFrame
from splitserve.protocol.states import RefuseReason
from splitserve.protocol.trace import NO_TRACE, TraceContext

log = logging.getLogger("splitserve.runtime")

_DROPPED_BY_FAULT: Mapping[type, str] = {KvReady: "worker.drop_kv_ready", TokenFrame: "worker.drop_frame"}

_TURN_S = 0.01  # events in a row, before whatever else the loop has to do gets its turn

# Told of an event, the commands it gave and the moment, once they are on their way; tracing is one.
Watch = Callable[[object, Sequence[object], float], None]


class ShellCore(Protocol):
    """What the shell asks of a core."""

    @property
    def idle(self) -> bool: ...
    def handle(self, event: Any, now: float) -> list[Any]: ...
    def wake_at(self) -> float | None: ...


class Shell:
    """`acts` says how commands beside the bus's are carried out: at once, without waiting."""

    def __init__(
        self,
        core: ShellCore,
        bus: Bus,
        acts: Mapping[type, Callable[[Any], None]],
        faults: Faults | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.drained = asyncio.Event()  # told to drain, and nothing is left
        self._core = core
        self._bus = bus
        self._acts = acts
        self._faults = faults or Faults()
        self._watch = watch
        self._loop = asyncio.get_running_loop()
        self._events: deque[object] = deque()
        self._something = asyncio.Event()
        self._nothing = asyncio.Event()  # every event was handled, its messages sent
        self._nothing.set()
        self._draining = False
        self._timer: asyncio.TimerHandle | None = None

    def put(self, event: object) -> None:
        """From a callback of the loop: the core will hear of it, in order."""
        self._events.append(event)
        self._nothing.clear()
        self._something.set()

    def receive(self, message: Message, reply_to: str | None) -> None:
        """A handler for subscriptions: it only enqueues."""
        self.put(Received(message, reply_to))

    async def settled(self, within_s: float) -> None:
        """Wait until all that was put is handled. Raises TimeoutError."""
        async with asyncio.timeout(within_s):
            await self._nothing.wait()

    async def run(self) -> None:
        """Until cancelled. An event whose handling raises is logged and costs no other."""
        try:
            while True:
                await self._something.wait()
                self._something.clear()
                since = self._loop.time()
                while self._events:
                    await self._handle(self._events.popleft())
                    if self._loop.time() - since > _TURN_S:
                        self._arm()  # timers are kept under a load that never leaves the queue empty, too
                        await asyncio.sleep(0)
                        since = self._loop.time()
                self._nothing.set()
                self._arm()
                if self._draining and self._core.idle:
                    self.drained.set()
        finally:
            if self._timer is not None:
                self._timer.cancel()

    async def _handle(self, event: object) -> None:
        self._draining = self._draining or isinstance(event, Drain)
        now = self._loop.time()
        try:
            commands = self._core.handle(event, now)
        except Exception:
            log.exception("event failed", extra=_told(event))
            return
        for command in commands:
            act = self._acts.get(type(command))
            if act is not None:
                act(command)
            else:
                await self._say(command)
        if self._watch is not None:
            self._watched(self._watch, event, commands, now)

    async def _say(self, command: object) -> None:
        """A command of the bus."""
        match command:
            case Publish(subject, message, reply):
                await self._publish(subject, message, reply)
            case Answer(reply_to, message):
                await self._publish(reply_to, message, False)
            case Ask():
                await self._ask(command)
            case _:
                raise TypeError(f"nobody carries out a {type(command).__name__}")

    def _watched(self, watch: Watch, event: object, commands: Sequence[object], now: float) -> None:
        """Who looks on can break nothing."""
        try:
            watch(event, commands, now)
        except Exception:
            log.exception("watch failed", extra=_told(event))

    def _arm(self) -> None:
        at = self._core.wake_at()
        if self._timer is not None:
            if self._timer.when() == at and not self._timer.cancelled():
                return
            self._timer.cancel()
            self._timer = None
        if at is not None:
            self._timer = self._loop.call_at(at, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.put(Tick())

    async def _publish(self, subject: str, message: Message, reply: bool) -> None:
        """A message that does not get out is lost like any other; the digest repairs that."""
        fault = _DROPPED_BY_FAULT.get(type(message))
        if fault is not None and self._faults.fires(fault):
            return
        try:
            await self._bus.publish(subject, message, reply=reply)
        except BusUnavailable as error:
            log.debug("message lost", extra={"kind": type(message).__name__, "why": error.message})
        except ProtocolError as error:
            log.error("message not sent", extra={"kind": type(message).__name__, "why": error.message})

    async def _ask(self, ask: Ask) -> None:
        """The core hears once of each question, however it ends."""

        def told(answer: Message | BusUnavailable | ProtocolError) -> None:
            self.put(_heard(ask.tag, answer))

        try:
            await self._bus.ask(ask.subject, ask.message, ask.timeout_s, told)
        except (BusUnavailable, ProtocolError) as error:
            told(error)


def _heard(tag: Any, answer: Message | BusUnavailable | ProtocolError) -> Answered | Unanswered:
    match answer:
        case MessageTooLarge():  # no try will make it smaller
            return Answered(tag, Refused(RefuseReason.TOO_LARGE, answer.message))
        case NoResponders():
            return Unanswered(tag, NoAnswer.NO_RESPONDERS)
        case RequestTimeout() | ProtocolError():
            return Unanswered(tag, NoAnswer.TIMEOUT)
        case BusUnavailable():
            return Unanswered(tag, NoAnswer.DISCONNECTED)
        case _:
            return Answered(tag, answer)


def _told(event: object) -> dict[str, str]:
    """What a log line says of an event: its kind, and the request and trace that it belongs to."""
    message = getattr(event, "message", None)
    trace = getattr(message, "trace", NO_TRACE)
    told = trace.told() if isinstance(trace, TraceContext) else {}
    return {"event": type(event).__name__, "rid": str(getattr(message, "rid", "")), **told}
