"""Text that grows token by token equals the text of all tokens, and never shows what it should not."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.model.tokenizer import Tokenizer
from splitserve.router.text import AnswerText, Detokenizer, StopStrings, TextRules

TEXTS = [
    "Hello, world! Ein Gruß aus Köln.",
    "日本語のテキスト、中文，한국어 👩‍👩‍👧‍👦 🇩🇪 👍🏽 \U0001f9ff",
    "  spaces \n\n\t code: x = [1, 2]\n",
    "\U000e0041\U00020bb7𠮷",
]


class Bytes:
    """A vocabulary of the 256 bytes; 256 and up are special."""

    special_ids = frozenset({256, 257})
    concatenates = False

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        special = b"" if skip_special_tokens else b"<s>"
        return b"".join(special if id > 255 else bytes([id]) for id in ids).decode(errors="replace")

    def alone(self, skip_special_tokens: bool = True) -> Mapping[int, str]:
        return {id: self.decode([id]) for id in range(0, 128, 2)}  # whole ones, and not all


def shown(stops: Sequence[str], pieces: Sequence[str], include: bool = False) -> tuple[str, str | None]:
    matcher = StopStrings(stops, include)
    text = ""
    for piece in pieces:
        text += matcher.push(piece)
        if matcher.hit is not None:
            return text, matcher.hit
    return text + matcher.flush(), None


def char_by_char(stops: Sequence[str], text: str, include: bool) -> tuple[str, str | None]:
    """The reference: read one character at a time, stop when what was read ends in a stop string."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    include=st.booleans(),
)
def test_stop_strings_do_not_depend_on_how_the_text_was_cut(stops: list[str], pieces: list[str], include: bool):
    assert shown(stops, pieces, include) == char_by_char(stops, "".join(pieces), include)


@given(stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1), pieces=st.lists(st.text("abc", max_size=4)))
def test_text_is_held_back_only_while_it_may_begin_a_stop_string(stops: list[str], pieces: list[str]):
    matcher = StopStrings(stops)
    given_text = out = ""
    for piece in pieces:
        given_text += piece
        out += matcher.push(piece)
        if matcher.hit is not None:
            return
        held = given_text[len(out) :]
        assert given_text == out + held
        assert not held or any(stop.startswith(held) for stop in stops)


def test_a_stop_string_that_ends_with_the_text_is_cut_or_kept():
    assert shown(["END"], ["some E", "N", "D more"]) == ("some ", "END")
    assert shown(["END"], ["some E", "N", "D more"], include=True) == ("some END", "END")
    assert shown(["END"], ["some EN"]) == ("some EN", None)


@given(text=st.text(max_size=40), cuts=st.randoms(use_true_random=False))
def test_bytes_become_whole_characters_only(text: str, cuts: random.Random):
    ids = list(text.encode())
    detokenizer = Detokenizer(Bytes().decode)
    out = ""
    while ids:
        n = cuts.randint(1, 3)
        out += detokenizer.push(ids[:n])
        ids = ids[n:]
        assert text.startswith(out)
    assert out + detokenizer.flush() == text


def test_bytes_that_never_become_a_character_are_shown_and_do_not_pile_up():
    detokenizer = Detokenizer(Bytes().decode)
    out = "".join(detokenizer.push([0xFF]) for _ in range(1000))
    assert set(out) == {"\ufffd"}
    assert len(out) == 997
    assert detokenizer.push(b"ok") + detokenizer.flush() == "\ufffd" * (1000 - len(out)) + "ok"


def test_a_cut_character_is_shown_as_broken_at_the_end():
    text = AnswerText(Bytes(), TextRules())
    assert text.push("aé".encode()[:2]) == "a"
    assert text.finish() == "\ufffd"


def test_a_prompt_that_ends_inside_a_word_gives_no_text_of_its_own():
    text = AnswerText(Bytes(), TextRules(), prompt_ids=list(b"Once upon"))
    assert text.push(list(b" a time")) + text.finish() == " a time"


def test_special_tokens_are_left_out_unless_asked_for():
    ids = [104, 256, 105, 257]
    assert AnswerText(Bytes(), TextRules()).push(ids) == "hi"
    assert AnswerText(Bytes(), TextRules(skip_special_tokens=False)).push(ids) == "h<s>i<s>"


def test_a_stop_token_has_no_text_unless_asked_for():
    rules = TextRules(stop_ids=frozenset({105}))
    assert AnswerText(Bytes(), rules).push(b"hi") == "h"
    assert AnswerText(Bytes(), TextRules(stop_ids=frozenset({105}), include_stop=True)).push(b"hi") == "hi"
    with_end = TextRules(stop_ids=frozenset({256}), skip_special_tokens=False)
    assert AnswerText(Bytes(), with_end).push([104, 256]) == "h"


def test_ids_after_a_stop_string_are_not_counted():
    text = AnswerText(Bytes(), TextRules(stops=("lo",)))
    assert text.push(b"hello world") == "hel"
    assert (text.stopped, text.tokens, text.finish()) == ("lo", 5, "")


def test_stop_strings_are_not_looked_for_before_min_tokens():
    text = AnswerText(Bytes(), TextRules(stops=("o",), min_tokens=5))
    assert text.push(b"hello world") == "hello w"
    assert text.tokens == 8


def test_a_stop_string_that_only_the_last_bytes_complete_is_found_at_the_end():
    text = AnswerText(Bytes(), TextRules(stops=("\ufffd",)))
    assert text.push([97, 0xF0]) + text.finish() == "a"
    assert text.stopped == "\ufffd"


@given(st.lists(st.lists(st.integers(0, 255), max_size=4)))
def test_ids_whose_texts_concatenate_give_the_same_pieces_without_context(pushes: list[list[int]]):
    """Also bytes that are no text."""
    plain = Detokenizer(Bytes().decode)
    quick = Detokenizer(Bytes().decode, concatenates=True, alone=Bytes().alone())
    for ids in pushes:
        assert quick.push(ids) == plain.push(ids)
    assert quick.flush() == plain.flush()


class Concatenating(Bytes):
    concatenates = True


@given(
    st.lists(st.integers(0, 257)),
    st.sampled_from([(), ("ab",), ("\ufffd",)]),
    st.sampled_from([frozenset[int](), frozenset({98})]),
    st.booleans(),
)
def test_a_word_by_itself_is_what_pushing_it_would_have_given(
    ids: list[int], stops: tuple[str, ...], stop_ids: frozenset[int], skip: bool
):
    rules = TextRules(stops=stops, stop_ids=stop_ids, skip_special_tokens=skip)
    quick, plain = AnswerText(Concatenating(), rules), AnswerText(Bytes(), rules)
    for id in ids:
        word = quick.word(id)
        assert (quick.push([id]) if word is None else word) == plain.push([id])
        assert (quick.tokens, quick.length, quick.stopped) == (plain.tokens, plain.length, plain.stopped)
    assert quick.finish() == plain.finish()


def test_a_word_by_itself_is_known_unless_it_is_mute_or_something_is_held():
    text = AnswerText(Concatenating(), TextRules(stop_ids=frozenset({98})))
    assert [text.word(id) for id in (96, 97, 98)] == ["`", None, None]
    text.push([0xC3])
    assert text.word(96) is None
    assert AnswerText(Concatenating(), TextRules(stops=("x",))).word(96) is None
    assert AnswerText(Bytes(), TextRules()).word(96) is None


@pytest.mark.model
def test_a_byte_level_tokenizer_needs_no_context(smollm2_folder: Path):
    tokenizer = Tokenizer.load(smollm2_folder)
    assert tokenizer.concatenates
    ids = random.Random(1).choices(range(tokenizer.vocab_size), k=2000)
    for _ in range(2):  # the second time all are known by themselves
        plain = Detokenizer(tokenizer.decode)
        quick = Detokenizer(tokenizer.decode, concatenates=True, alone=tokenizer.alone(skip_special_tokens=True))
        assert [quick.push([id]) for id in ids] == [plain.push([id]) for id in ids]
    assert len(tokenizer.alone(skip_special_tokens=True)) > 1000


@pytest.mark.model
@pytest.mark.slow
def test_a_tokenizer_that_drops_the_first_space_needs_context(gemma3_folder: Path):
    assert not Tokenizer.load(gemma3_folder).concatenates


@pytest.mark.model
@pytest.mark.parametrize("text", TEXTS)
def test_real_tokens_give_the_text_of_all_of_them(smollm2_folder: Path, text: str):
    check_incremental(Tokenizer.load(smollm2_folder), text)


@pytest.mark.model
@pytest.mark.slow
def test_real_tokens_with_byte_fallback_give_the_text_of_all_of_them(gemma3_folder: Path):
    tokenizer = Tokenizer.load(gemma3_folder)
    for text in TEXTS:
        check_incremental(tokenizer, text)


def check_incremental(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, False)
    answer = AnswerText(tokenizer, TextRules(), prompt_ids=tokenizer.encode("Once upon a", False))
    out = ""
    for id in ids:
        out += answer.push([id])
        assert text.startswith(out)
    assert out + answer.finish() == text == tokenizer.decode(ids)
    assert answer.length == len(text)
