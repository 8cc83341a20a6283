"""From ids to text that may be shown: incremental detokenising and stop strings. Pure.

The detokeniser decodes a window of the last few ids twice, with and without the new ones; what is longer is new text
(the prefix-offset algorithm of Hugging Face's text-generation-inference, also vLLM's). Text ends at whole characters only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Protocol

_CONTEXT = 6  # prompt ids before the answer: SentencePiece drops the first word's space without them
_INCOMPLETE = 4  # bytes of the longest character: fewer ids than this can be the beginning of one
_BROKEN = "\ufffd"

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Text of a growing list of ids. `prompt_ids` are context only and give no text.

    With `concatenates` (the text of two lists in a row is that of both together, but for a character that the border
    cuts) nothing is decoded for context: once a token, and not twice; and not at all what `alone` has, texts that
    `decode` gave for an id by itself, whole to their last character.
    """

    __slots__ = ("_alone", "_concatenates", "_decode", "_shown", "_shown_text", "_window")

    def __init__(
        self,
        decode: Decode,
        prompt_ids: Sequence[int] = (),
        *,
        concatenates: bool = False,
        alone: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self._decode = decode
        self._alone = alone if concatenates else {}
        self._concatenates = concatenates
        self._window = [] if concatenates else list(prompt_ids[-_CONTEXT:])
        self._shown = 0  # ids of the window whose text was given out
        self._shown_text = ""
        self.flush()

    def word(self, id: int) -> str | None:
        """The new text of one id more, if `alone` has it and nothing is held, as with most; else None, and `push` it."""
        return None if self._window else self._alone.get(id)

    def push(self, ids: Sequence[int]) -> str:
        """The new text, up to the last whole character."""
        if len(ids) == 1 and (word := self.word(ids[0])) is not None:
            return word
        if self._concatenates and not self._window:
            text = self._decode(ids)
            if not text.endswith(_BROKEN):
                return text
        self._window.extend(ids)
        most = min(_INCOMPLETE, len(self._window) - self._shown)
        for held in range(most):
            text = self._decode(self._window[: len(self._window) - held])
            if not text.endswith(_BROKEN):
                return self._give(text, held)
        if most < _INCOMPLETE:
            return ""
        held = _INCOMPLETE - 1  # what is before can never become a character: show it as it is
        return self._give(self._decode(self._window[:-held]), held)

    def flush(self) -> str:
        """What is held, broken characters as U+FFFD: the answer has ended."""
        return self._give(self._decode(self._window), 0)

    def _give(self, text: str, held: int) -> str:
        if self._concatenates:
            del self._window[: len(self._window) - held]
            return text
        new = text[len(self._shown_text) :]
        del self._window[: self._shown]
        self._shown = len(self._window) - held
        self._shown_text = self._decode(self._window[: self._shown])
        if self._shown_text.endswith(_BROKEN):  # no context: it would spoil the bytes that follow
            del self._window[: self._shown]
            self._shown, self._shown_text = 0, ""
        return new


class StopStrings:
    """Finds the stop string that ends first, also across pushes, and holds back text that may begin one.

    What comes out does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._pending = ""
        self.hit: str | None = None

    def push(self, text: str) -> str:
        """The text that may be shown now. After a hit, nothing more may."""
        self._pending += text
        found = min(
            ((at + len(stop), at, stop) for stop in self._stops if (at := self._pending.find(stop)) >= 0), default=None
        )
        if found is not None:
            end, start, self.hit = found
            shown, self._pending = self._pending[: end if self._include else start], ""
            return shown
        keep = max((_overlap(self._pending, stop) for stop in self._stops), default=0)
        cut = len(self._pending) - keep
        shown, self._pending = self._pending[:cut], self._pending[cut:]
        return shown

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        shown, self._pending = self._pending, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return len(text) - at
        at = text.find(stop[0], at + 1)
    return 0


@dataclass(frozen=True, slots=True)
class TextRules:
    """What a request says about its answers' text."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False  # the stop string, or the stop token's text, is part of the answer
    stop_ids: frozenset[int] = frozenset()  # ids that end an answer: end-of-sequence and stop_token_ids
    skip_special_tokens: bool = True
    min_tokens: int = 0  # stop strings are not looked for before


class Vocabulary(Protocol):
    """What this module needs of a tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def concatenates(self) -> bool: ...  # as `Detokenizer` has it

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def alone(self, skip_special_tokens: bool = True) -> Mapping[int, str]: ...  # as `Detokenizer` has it


class AnswerText:
    """The text of one answer. Feed ids in order until `stopped`, then `finish`."""

    __slots__ = ("_detokenizer", "_mute", "_one_by_one", "_rules", "_stops", "length", "tokens")

    def __init__(self, vocabulary: Vocabulary, rules: TextRules, prompt_ids: Sequence[int] = ()) -> None:
        self._rules = rules
        # ids without text never enter the window: a thousand of them would make it a thousand long
        hidden = vocabulary.special_ids if rules.skip_special_tokens else frozenset[int]()
        self._mute = hidden if rules.include_stop else hidden | rules.stop_ids  # ids that give no text
        self._detokenizer = Detokenizer(
            partial(vocabulary.decode, skip_special_tokens=rules.skip_special_tokens),
            [id for id in prompt_ids[-4 * _CONTEXT :] if id not in hidden],
            concatenates=vocabulary.concatenates,
            alone=vocabulary.alone(rules.skip_special_tokens),
        )
        self._stops = StopStrings(rules.stops, rules.include_stop)
        self._one_by_one = bool(rules.stops)
        self.tokens = 0  # ids that belong to the answer, the one that ended it included
        self.length = 0  # characters detokenised, held ones included

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the answer."""
        return self._stops.hit

    def word(self, id: int) -> str | None:
        """The text of one id more where it is a whole word and nothing else hangs on it; else None, and `push` it."""
        if self._one_by_one or id in self._mute:
            return None
        text = self._detokenizer.word(id)
        if text is not None:
            self.tokens += 1
            self.length += len(text)
        return text

    def push(self, ids: Sequence[int]) -> str:
        """Text that may be shown now. Ids after a stop string are ignored: `tokens` does not count them."""
        if not self._one_by_one:
            self.tokens += len(ids)
            return self._detokenise([id for id in ids if id not in self._mute])
        shown = ""
        for id in ids:
            if self.stopped is not None:
                break
            self.tokens += 1
            text = "" if id in self._mute else self._detokenise([id])
            shown += self._stops.push(text) if self.tokens > self._rules.min_tokens else text
        return shown

    def finish(self) -> str:
        """The rest: a broken character, text held back."""
        if self.stopped is not None:
            return ""
        rest = self._detokenizer.flush()
        self.length += len(rest)
        return self._stops.push(rest) + ("" if self.stopped is not None else self._stops.flush())

    def _detokenise(self, ids: Sequence[int]) -> str:
        text = self._detokenizer.push(ids) if ids else ""
        self.length += len(text)
        return text
