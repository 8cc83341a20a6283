"""The answers of one HTTP request as they grow: generation events in, deltas out. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from splitserve.errors import RequestFailed, SplitserveError
from splitserve.protocol.params import TokenLogprob
from splitserve.protocol.states import FinishReason
from splitserve.router.generation import Done, GenerationEvent, Submission, Tokens
from splitserve.router.observe import Progress
from splitserve.router.text import AnswerText, TextRules, Vocabulary

_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A token with its log-probabilities; `offset` is where its text begins in the answer, in characters."""

    id: int
    logprob: TokenLogprob
    offset: int


@dataclass(slots=True)
class Delta:
    """What is new of one answer since the last delta."""

    index: int
    text: str = ""
    tokens: int = 0
    records: Sequence[TokenRecord] = ()  # with log-probabilities only
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # the stop string or stop_token_ids entry that was met, as vLLM has it


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    stages: Mapping[str, float] = field(default_factory=dict[str, float])  # seconds, when they were asked for


class Answer:
    """One choice."""

    __slots__ = ("_delta", "_last_id", "_stop_token_ids", "_text", "finish_reason", "last_at")

    def __init__(self, index: int, text: AnswerText, stop_token_ids: frozenset[int]) -> None:
        self._text = text
        self._stop_token_ids = stop_token_ids
        self._delta = Delta(index)
        self._last_id = -1
        self.finish_reason: str | None = None
        self.last_at: float | None = None  # when its newest tokens came

    @property
    def tokens(self) -> int:
        return self._text.tokens

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None

    def word(self, event: Tokens) -> str | None:
        """The text of an event that is a token, a whole word and nothing besides, as with most; else None, and `take` it."""
        ids = event.ids
        if len(ids) != 1 or self.finish_reason is not None:
            return None
        word = self._text.word(ids[0])
        if word is not None:
            self._last_id = ids[0]
        return word

    def take(self, event: Tokens) -> bool:
        """True when a stop string was met: this answer needs no more tokens."""
        if self.finish_reason is not None:
            return False
        text, delta = self._text, self._delta
        before = text.tokens
        if event.logprobs:
            delta.records = records = [*delta.records]
            for id, logprob in zip(event.ids, event.logprobs, strict=True):
                records.append(TokenRecord(id, logprob, text.length))
                delta.text += text.push((id,))
                if text.stopped is not None:
                    break
        else:
            delta.text += text.push(event.ids)
        delta.tokens += text.tokens - before
        if event.ids:
            self._last_id = event.ids[-1]
        stopped = text.stopped
        if stopped is None:
            return False
        self._end("stop", stopped)
        return True

    def finish(self, reason: FinishReason) -> None:
        if self.ended or reason not in _REASONS:  # an engine's error comes with Done
            return
        self._delta.text += self._text.finish()
        if self._text.stopped is not None:
            self._end("stop", self._text.stopped)
        else:
            met = reason is FinishReason.STOP and self._last_id in self._stop_token_ids
            self._end(_REASONS[reason], self._last_id if met else None)

    def drain(self) -> Delta | None:
        """What is new, None when nothing is."""
        delta = self._delta
        if not delta.tokens and not delta.text and delta.finish_reason is None:
            return None
        self._delta = Delta(delta.index)
        return delta

    def _end(self, reason: str, stop_reason: int | str | None) -> None:
        self.finish_reason = self._delta.finish_reason = reason
        self._delta.stop_reason = stop_reason


class Taken(NamedTuple):
    """What an event asks of the shell."""

    stop: bool = False  # tell the generation that this choice needs no more tokens
    first: bool = False  # the first tokens of all
    gap: float | None = None  # seconds since this answer's last tokens


_NOTHING = Taken()
# without the constructor, a Python function: one is made for each token
_taken: Callable[[tuple[bool, bool, float | None]], Taken] = partial(tuple.__new__, Taken)


class Answers:
    """All choices of all prompts; choice c of prompt p has index p * n + c, as OpenAI orders them."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        rules: TextRules,
        submissions: Sequence[Submission],
        stop_token_ids: frozenset[int],
        cached_tokens: Callable[[int], int],  # of a prompt that got a token
    ) -> None:
        self._prompt_tokens = tuple(len(submission.ids) for submission in submissions)
        self._n = len(submissions[0].seeds)
        self.choices = [
            Answer(p * self._n + c, AnswerText(vocabulary, rules, submission.ids), stop_token_ids)
            for p, submission in enumerate(submissions)
            for c in range(self._n)
        ]
        self._cached_tokens = cached_tokens
        self.preemptions = 0
        self.stages: list[dict[str, float]] = []
        self.started = False
        self.done = False  # every prompt had its Done
        self._open = len(submissions)

    def take(self, prompt: int, event: GenerationEvent, at: float) -> Taken:
        """Raises the request's own error when it failed; nothing but that error may follow then."""
        if not isinstance(event, Tokens):
            if isinstance(event, Done):
                self._finish(prompt, event)
            else:
                self.choices[prompt * self._n + event.choice].finish(event.reason)
            return _NOTHING
        answer = self.choices[prompt * self._n + event.choice]
        first, self.started = not self.started, True
        gap = None if answer.last_at is None else at - answer.last_at
        answer.last_at = at
        return _taken((answer.take(event), first, gap))

    def drain(self) -> list[Delta]:
        if len(self.choices) == 1:
            delta = self.choices[0].drain()
            return [] if delta is None else [delta]
        return [delta for answer in self.choices if (delta := answer.drain()) is not None]

    def usage(self, stages: Mapping[str, float]) -> Usage:
        had = self.progress()
        return Usage(sum(self._prompt_tokens), had.generated, had.cached, stages)

    def usage_of(self, index: int) -> Usage:
        """Usage as one choice sees it: `continuous_usage_stats`."""
        prompt = index // self._n
        return Usage(self._prompt_tokens[prompt], self.choices[index].tokens, self._cached_tokens(prompt))

    def progress(self) -> Progress:
        generated = prompts = cached = 0
        for prompt, length in enumerate(self._prompt_tokens):
            tokens = sum(answer.tokens for answer in self.choices[prompt * self._n : (prompt + 1) * self._n])
            if tokens:
                generated += tokens
                prompts += length
                cached += self._cached_tokens(prompt)
        return Progress(generated, prompts, cached)

    def _finish(self, prompt: int, event: Done) -> None:
        unfinished = [a for a in self.choices[prompt * self._n : (prompt + 1) * self._n] if not a.ended]
        if unfinished:
            error: SplitserveError = event.error or RequestFailed("the request ended before its answer did")
            raise error
        self._open -= 1
        self.done = self._open == 0
        self.preemptions += event.preemptions
        self.stages.append(event.stages)
