"""A token that goes the short way to its client is the same event, counted and timed as on the long one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from splitserve.protocol.params import SamplingParams, TokenLogprob
from splitserve.protocol.states import FinishReason
from splitserve.router.generation import Done, Finished, GenerationEvent, Submission, Tokens
from splitserve.router.openai.answers import Answers
from splitserve.router.openai.running import Arrival
from splitserve.router.openai.wire import DONE, ChatWire, ChunkWriter, CompletionWire, Wire
from splitserve.router.openai.writing import Writing
from splitserve.router.protocol import CONNECTION
from splitserve.router.sse import EventStream
from splitserve.router.text import TextRules
from splitserve.router.turn import Turn


class Letters:
    """Ids are bytes; with `known` the texts of single ones are known by themselves."""

    special_ids = frozenset({300})
    concatenates = True

    def __init__(self, known: bool) -> None:
        self._alone = {id: chr(id) for id in range(128)} if known else {}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(id for id in ids if id < 256).decode(errors="replace")

    def alone(self, skip_special_tokens: bool = True) -> Mapping[int, str]:
        return self._alone

    def token_bytes(self, id: int) -> bytes:
        return bytes([id])

    def token_text(self, id: int) -> str:
        return chr(id)


class Client:
    """One stream up to the socket. `full`: it does not read."""

    def __init__(self, wire: Wire, vocabulary: Letters, *, n: int = 1, logprobs: bool = False) -> None:
        self.parts: list[bytes] = []
        self.gaps: list[float] = []
        self.full = False
        params = SamplingParams(max_tokens=9)
        asked = Submission("r", "m", (1,), params, tuple(range(n)), 1.0)
        self.answers = Answers(vocabulary, TextRules(stop_ids=frozenset({10})), (asked,), frozenset({10}), lambda _: 0)
        extension = {"write": self.parts.append, "full": lambda: self.full, "abort": lambda: None}
        scope: dict[str, Any] = {"extensions": {CONNECTION: extension}, "state": {"written": 0}}
        self.events = EventStream(scope, self._receive, self._send, (), stall_s=5, turn=Turn())
        head: dict[str, object] = {"id": "r", "created": 1, "model": "m"}
        writer = ChunkWriter(wire, vocabulary, head, logprobs=logprobs, include_usage=True, continuous=False)
        self.writing = Writing(
            self._take, self.answers, writer, self.events, gap=self.gaps.append, stages=dict[str, float]
        )

    async def tell(self, *told: GenerationEvent) -> None:
        """Each at a moment of its own, a second after the one before it."""
        for at, event in enumerate(told):
            await self.arrived((0, event, float(at)))

    async def arrived(self, *arrived: Arrival) -> bool:
        more = self.writing.take(list(arrived))
        if self.writing.unwritten:
            await self.events.write(self.writing.unwritten)
            self.writing.unwritten = b""
        return more

    def _take(self, arrived: list[Arrival]) -> bool:
        for prompt, event, at in arrived:
            taken = self.answers.take(prompt, event, at)
            if taken.gap is not None:
                self.gaps.append(taken.gap)
        return not self.answers.done

    async def _receive(self) -> Message:
        raise AssertionError("nobody asked for more")

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            self.parts.append(message["body"] or b"END")


TOLD = st.lists(st.lists(st.sampled_from([10, 65, 66, 67, 0xC3, 0xA9, 300]), min_size=1, max_size=2), max_size=12)


@pytest.mark.parametrize("wire", [ChatWire(), CompletionWire()])
@given(told=TOLD, reason=st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]))
async def test_what_is_known_by_itself_is_written_counted_and_timed_as_what_is_not(
    wire: Wire, told: list[list[int]], reason: FinishReason
) -> None:
    short, long = Client(wire, Letters(known=True)), Client(wire, Letters(known=False))
    for client in (short, long):
        events = [Tokens(0, index, tuple(ids)) for index, ids in enumerate(told)]
        await client.tell(*events, Finished(0, reason), Done())
        await client.events.end()
    assert b"".join(short.parts) == b"".join(long.parts)
    assert short.gaps == long.gaps
    assert short.answers.progress() == long.answers.progress()
    assert short.answers.choices[0].last_at == long.answers.choices[0].last_at
    assert b"".join(short.parts).endswith(DONE + b"END")


async def test_a_reader_who_lags_gets_a_word_once_and_no_more_is_taken_before() -> None:
    client = Client(CompletionWire(), Letters(known=True))
    await client.tell(Tokens(0, 0, (65,)))
    client.full = True
    assert not client.writing.take([(0, Tokens(0, 1, (66,)), 1.0)])
    await client.events.write(client.writing.unwritten)
    await client.events.end()
    assert b"".join(client.parts).count(b'"text":"B"') == 1


async def test_log_probabilities_and_several_answers_go_the_long_way() -> None:
    probs = (TokenLogprob(-0.5, 1, ((66, -0.5),)),)
    with_probs = Client(CompletionWire(), Letters(known=True), logprobs=True)
    await with_probs.tell(Tokens(0, 0, (65,), probs), Tokens(0, 1, (66,), probs))
    await with_probs.events.end()
    assert b"".join(with_probs.parts).count(b'"token_logprobs":[-0.5]') == 2
    two = Client(CompletionWire(), Letters(known=True), n=2)
    await two.tell(Tokens(0, 0, (65,)), Tokens(1, 0, (66,)), Tokens(1, 1, (67,)))
    await two.events.end()
    assert b"".join(two.parts).count(b'"index":1,') == 2
