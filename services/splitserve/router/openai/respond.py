"""The shell of both generation endpoints: submit, gather, write, and leave at once when the client does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from splitserve.errors import Overloaded, SplitserveError, row_of
from splitserve.router.generation import Generator, Submission, Tokens
from splitserve.router.http_errors import ClientGone, error_object, error_response
from splitserve.router.observe import Outcome, RequestEnd, RequestObserver
from splitserve.router.openai.answers import Answers, Delta
from splitserve.router.openai.running import Arrival, Inbox, generating, unless_gone
from splitserve.router.openai.wire import ChunkWriter, Json, Spelling, Wire, error_events, whole_answer
from splitserve.router.openai.writing import Writing
from splitserve.router.refusals import refusal_reason
from splitserve.router.sse import EventStream
from splitserve.router.stages import breakdown, gap_breakdown
from splitserve.router.text import TextRules, Vocabulary
from splitserve.router.turn import Turn

T = TypeVar("T")


class TokenText(Vocabulary, Spelling, Protocol):
    """What answers need of a tokenizer."""


@dataclass(frozen=True, slots=True)
class Job:
    """A valid request, ready to run. `arrived` is of time.monotonic(), `created` of the wall clock."""

    rid: str
    model: str
    created: int
    arrived: float
    submissions: tuple[Submission, ...]
    rules: TextRules
    stop_token_ids: frozenset[int]
    logprobs: bool
    include_usage: bool
    continuous_usage: bool
    include_stages: bool

    @property
    def head(self) -> Json:
        return {"id": self.rid, "created": self.created, "model": self.model}


class Exchange:
    """One job on its way, and what is to be reported of it."""

    def __init__(
        self, job: Job, wire: Wire, generator: Generator, tokenizer: TokenText, watch: RequestObserver, turn: Turn
    ) -> None:
        self.turn = turn
        self._job = job
        self._wire = wire
        self._generator = generator
        self._tokenizer = tokenizer
        self._watch = watch
        self._inbox = Inbox(turn)
        self._answers = Answers(tokenizer, job.rules, job.submissions, job.stop_token_ids, self._inbox.cached_tokens)
        self._first_at: float | None = None
        self._detokenise_s = 0.0
        self._failure: SplitserveError | None = None  # what ended the request

    async def whole(self, receive: Receive) -> Response:
        """The whole answer. Raises the request's error, ClientGone."""
        return await self._reported(receive, self._whole(), lambda: False)

    async def stream(self, receive: Receive, events: EventStream) -> None:
        """Write the answer's events as they come. Raises the request's error (also after it was written), ClientGone."""
        await self._reported(receive, self._stream(events), lambda: events.started)

    async def _whole(self) -> Response:
        async with generating(self._generator, self._job.submissions, self._inbox):
            await self._inbox.each(self._take)
            if self._failure is not None:
                raise self._failure
        deltas = [answer.drain() or Delta(index) for index, answer in enumerate(self._answers.choices)]
        body = whole_answer(
            self._wire,
            self._tokenizer,
            self._job.head,
            deltas,
            self._answers.usage(self._stages()),
            logprobs=self._job.logprobs,
        )
        return Response(body, media_type="application/json")

    async def _stream(self, events: EventStream) -> None:
        answers = self._answers
        writer = ChunkWriter(
            self._wire,
            self._tokenizer,
            self._job.head,
            logprobs=self._job.logprobs,
            include_usage=self._job.include_usage,
            continuous=self._job.continuous_usage,
        )
        writing = Writing(self._take, answers, writer, events, gap=self._watch.gap, stages=self._stages)
        try:
            async with generating(self._generator, self._job.submissions, self._inbox):
                while not answers.done:
                    if self._failure is not None:
                        raise self._failure
                    await self._inbox.each(writing.take)
                    if writing.unwritten:
                        await events.write(writing.unwritten)
                        writing.unwritten = b""
        except SplitserveError as failure:
            if events.started:  # the status is spent
                await events.write(error_events(error_object(failure)))
            raise

    def _stages(self) -> dict[str, float]:
        """Where the time went, for who asked: the stages and sums of docs/metrics.md."""
        job, stages = self._job, self._answers.stages
        if not job.include_stages or self._first_at is None:
            return {}
        ttft = breakdown(
            stages,
            tokenise_s=job.submissions[0].tokenise_s,
            detokenise_s=self._detokenise_s,
            first_token_s=self._first_at - job.arrived,
        )
        gap = gap_breakdown(stages[0])
        return {"ttft": sum(ttft.values()), **ttft} | ({"first_gap": sum(gap.values()), **gap} if gap else {})

    def _take(self, arrived: list[Arrival]) -> bool:
        """Take what has arrived into the answers. False: that is all, or `_failure` ended the request."""
        for prompt, event, at in arrived:
            began = time.monotonic() if self._first_at is None else 0.0
            try:
                taken = self._answers.take(prompt, event, at)
            except SplitserveError as error:
                self._failure = error
                return False
            if taken.gap is not None:
                self._watch.gap(taken.gap)
            elif taken.first:
                self._first_at = at
                self._detokenise_s = time.monotonic() - began
                self._watch.first_token(at - self._job.arrived + self._detokenise_s)
            if taken.stop and isinstance(event, Tokens):
                self._inbox.stop(prompt, event.choice)
        return not self._answers.done

    async def _reported(self, receive: Receive, work: Coroutine[Any, Any, T], begun: Callable[[], bool]) -> T:
        """`begun`: whether the client has something of an answer."""
        self._watch.live(self._answers.progress)
        try:
            result = await unless_gone(receive, work)
        except (ClientGone, asyncio.CancelledError):
            self._report("cancelled")
            raise
        except SplitserveError as error:
            # with tokens it was taken, unless one of its prompts was not, and the client is told nothing else
            taken = self._first_at is not None and (begun() or not isinstance(error, Overloaded))
            self._report("failed", row_of(error).code, "" if taken else refusal_reason(error))
            raise
        except Exception:
            self._report("failed", row_of(SplitserveError).code)
            raise
        self._report("finished")
        return result

    def _report(self, outcome: Outcome, code: str = "", refused: str = "") -> None:
        job, choices, had = self._job, self._answers.choices, self._answers.progress()
        last_at = max((choice.last_at for choice in choices if choice.last_at is not None), default=None)
        self._watch.end(
            RequestEnd(
                outcome,
                seconds=time.monotonic() - job.arrived,
                code=code,
                refused=refused,
                finish_reasons=tuple(choice.finish_reason for choice in choices if choice.finish_reason is not None),
                prompt_tokens=tuple(len(submission.ids) for submission in job.submissions),
                cached_tokens=had.cached,
                generation_tokens=tuple(choice.tokens for choice in choices),
                n=len(job.submissions[0].seeds),
                max_tokens=max(submission.params.max_tokens for submission in job.submissions),
                first_token_s=None if self._first_at is None else self._first_at - job.arrived,
                last_token_s=None if last_at is None else last_at - job.arrived,
                detokenise_s=self._detokenise_s,
                stages=tuple(self._answers.stages),
                preemptions=self._answers.preemptions,
            )
        )


class StreamedAnswer(Response):
    """An answer as server-sent events. Headers wait for the first event, so an early failure has its own status."""

    def __init__(self, exchange: Exchange, headers: Mapping[str, str], *, stall_s: float) -> None:
        super().__init__(headers=headers)
        self._exchange = exchange
        self._stall_s = stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        own = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        events = EventStream(scope, receive, send, own, stall_s=self._stall_s, turn=self._exchange.turn)
        try:
            await self._exchange.stream(receive, events)
        except SplitserveError as error:
            if not events.started:
                await error_response(error)(scope, receive, send)
                return
        except ClientGone:
            return
        await events.end()
