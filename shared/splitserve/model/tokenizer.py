"""The tokenizer of a model folder, read without torch: `tokenizer.json` through the `tokenizers` library.

It gives the ids and the text of transformers' fast tokenizers (a test compares them). transformers itself is not
imported: in a router it would bring torch along, 245 MiB instead of 14.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import cast

import orjson
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from splitserve.errors import ModelUnavailable
from splitserve.model.files import Json, read_json

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_WORD_START = "▁"  # SentencePiece's space


class Tokenizer:
    """Text to ids and back; safe to use from several threads at once."""

    def __init__(self, backend: Backend, named_tokens: dict[str, str]) -> None:
        self._backend = backend
        self.named_tokens = named_tokens  # bos_token, eos_token … as a chat template sees them
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self._added = {id: token.content for id, token in added.items()}
        self._decoders = frozenset(_kinds(backend))
        # decoding two lists of ids in a row is decoding both at once
        self.concatenates = self._decoders == frozenset(("ByteLevel",))
        self._bytes: dict[int, bytes] = {}
        # text of an id by itself, without skipping and with: nearly all that streams ask for
        self._alone: tuple[dict[int, str], dict[int, str]] = ({}, {})

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Raises ModelUnavailable when the folder has no readable tokenizer.json."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelUnavailable(
                f"{folder} has no tokenizer.json; make one with transformers: AutoTokenizer.from_pretrained(F).save_pretrained(F)"
            )
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelUnavailable(f"{path} cannot be read: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        config = read_json(folder / "tokenizer_config.json")
        named = _named_tokens(config, read_json(folder / "special_tokens_map.json"))
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        backend.add_special_tokens([AddedToken(text, special=True) for text in named.values() if text not in known])
        _set_borders(backend, config, named)
        return cls(backend, named)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of `text`; the Rust side releases the GIL."""
        # the fast way does not trace where in the text each token began, which takes a quarter of the time
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. Ids that the vocabulary lacks are left out."""
        text = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        if len(ids) == 1 and text and not text.endswith("\ufffd"):  # ids without a token are without number
            self._alone[skip_special_tokens][ids[0]] = text
        return text

    def alone(self, skip_special_tokens: bool = True) -> Mapping[int, str]:
        """What `decode` gave for single ids so far, if it ends with a whole character: a look costs less than a call."""
        return self._alone[skip_special_tokens]

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for inside a text; b"" for an id without a token."""
        found = self._bytes.get(id)
        if found is None:
            found = self._bytes[id] = self._token_bytes(id)
        return found

    def _token_bytes(self, id: int) -> bytes:
        if id in self._added:
            return self._added[id].encode()
        token = self._backend.id_to_token(id) or ""
        if "ByteLevel" in self._decoders and all(char in _BYTE_OF for char in token):
            return bytes(_BYTE_OF[char] for char in token)
        if "ByteFallback" in self._decoders and len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)])
        return token.replace(_WORD_START, " ").encode()

    def token_text(self, id: int) -> str:
        """`token_bytes` as text, with U+FFFD for a part of a character."""
        return self.token_bytes(id).decode(errors="replace")

    def id_of(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    @cached_property
    def vocab_size(self) -> int:
        """Ids with a token, added ones included."""
        return self._backend.get_vocab_size()

    @cached_property
    def longest_token_bytes(self) -> int:
        """No token stands for more bytes: a text of b bytes has at least b / this many tokens."""
        shrink = "ByteLevel" in self._decoders  # one character of a byte-level token is one byte
        lengths = (len(token) if shrink else len(token.encode()) for token in self._backend.get_vocab())
        return max(1, *lengths, *(len(text.encode()) for text in self._added.values()))


def _named_tokens(config: Json, legacy: Json) -> dict[str, str]:
    """Special tokens by name, as transformers' `special_tokens_map` has them."""
    found: dict[str, str] = {}
    extra = config.get("extra_special_tokens")
    named = cast(Json, extra) if isinstance(extra, dict) else {}
    for name in (*_NAMED, *named):
        value = config.get(name, named.get(name, legacy.get(name)))
        text = cast(Json, value).get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _set_borders(backend: Backend, config: Json, named: dict[str, str]) -> None:
    """`add_bos_token` and `add_eos_token` of the config replace the post-processor, as transformers 5 does."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    bos = named.get("bos_token") if config.get("add_bos_token") else None
    eos = named.get("eos_token") if config.get("add_eos_token") else None
    single = [*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])]
    pair = [*single, *([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
    ids = [(text, id) for text in (bos, eos) if text and (id := backend.token_to_id(text)) is not None]
    backend.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def _kinds(backend: Backend) -> Iterator[str]:
    """The types of the decoders in a tokenizer, nested ones too."""
    if backend.decoder is None:
        return
    stack = [cast(Json, orjson.loads(backend.decoder.__getstate__()))]
    while stack:
        decoder = stack.pop()
        yield str(decoder["type"])
        stack.extend(cast(list[Json], decoder.get("decoders", [])))


def _byte_of() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_of()
