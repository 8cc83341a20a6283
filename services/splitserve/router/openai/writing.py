"""One stream's answers on their way to its client: what has arrived becomes events, and these are written.

What nearly every token adds is a word, and nothing hangs on it. It goes a short way: one object, and no delta between. A router
with little to do finds its caches cold at each step, and each object that a token has to look at costs it then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from splitserve.router.generation import Tokens
from splitserve.router.openai.answers import Answers
from splitserve.router.openai.running import Arrival
from splitserve.router.openai.wire import ChunkWriter, dumps
from splitserve.router.sse import EventStream


class Writing:
    """`take` takes what has arrived into `answers`, False when that is all; `gap` is told the seconds between two tokens."""

    __slots__ = (
        "_after",
        "_answers",
        "_before",
        "_events",
        "_gap",
        "_only",
        "_stages",
        "_take",
        "_writer",
        "unwritten",
    )

    def __init__(
        self,
        take: Callable[[list[Arrival]], bool],
        answers: Answers,
        writer: ChunkWriter,
        events: EventStream,
        *,
        gap: Callable[[float], None],
        stages: Callable[[], Mapping[str, float]],
    ) -> None:
        self.unwritten = b""  # what has to wait until the client has read something
        self._take = take
        self._answers = answers
        self._writer = writer
        self._events = events
        self._gap = gap
        self._stages = stages
        self._only = answers.choices[0] if writer.plain and len(answers.choices) == 1 else None
        self._before, self._after = writer.around(0)

    def take(self, arrived: list[Arrival]) -> bool:
        """Write what has arrived. False: that is all, or `unwritten` is to be written before more is taken."""
        events = self._events
        if len(arrived) == 1 and events.started:
            word = self._word(arrived[0])
            if word is not None:
                return self._write(self._before + dumps(word) + self._after)
        more, deltas = self._take(arrived), self._answers.drain()
        written = self._writer.deltas(deltas, self._answers.usage_of)
        if written and not events.started:
            written = self._writer.opening(range(len(self._answers.choices)), self._answers.usage_of) + written
        if self._answers.done:
            written += self._writer.closing(self._answers.usage(self._stages()))
        return self._write(written) and more

    def _word(self, arrival: Arrival) -> str | None:
        """The text of a token that may go the short way; None: nothing was done, it must go the long one."""
        _, event, at = arrival
        answer = self._only
        if answer is None or answer.last_at is None or not isinstance(event, Tokens):
            return None
        word = answer.word(event)
        if word is not None:
            self._gap(at - answer.last_at)
            answer.last_at = at
        return word

    def _write(self, events: bytes) -> bool:
        if events and not self._events.write_soon(events):
            self.unwritten = events
            return False
        return True
