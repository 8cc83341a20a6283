"""A scripted Generator behind the real HTTP side: what the endpoints see of a cluster, without one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from splitserve.config import HttpSettings, RoutingSettings
from splitserve.model.facts import GenerationDefaults, ModelFacts
from splitserve.model.tokenizer import Tokenizer
from splitserve.protocol.params import TokenLogprob
from splitserve.protocol.states import FinishReason
from splitserve.router.app import create_app
from splitserve.router.generation import Done, Finished, GenerationEvent, Hear, Submission, Tokens
from splitserve.router.parts import RouterParts
from splitserve.router.protocol import RouterProtocol
from splitserve.runtime.http import bind, port_of, serving

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
EOS = 256  # ids below it are bytes, so that a prompt's ids can be read
MODEL = "org/small"

Play = Callable[["ScriptedGeneration"], AsyncIterator[GenerationEvent]]


class ScriptedGeneration:
    """Plays one script; remembers what was done to it."""

    def __init__(self, submission: Submission, play: Play, hear: Hear) -> None:
        self.submission = submission
        self.cached_tokens = 4
        self.stopped: list[int] = []
        self.left = asyncio.Event()
        self.entered = False
        self.left_by: object = None  # the exception that it was left by
        self._play = play
        self._hear = hear
        self._playing: asyncio.Task[None] | None = None

    def stop(self, choice: int) -> None:
        self.stopped.append(choice)

    async def __aenter__(self) -> ScriptedGeneration:
        self.entered = True
        self._playing = asyncio.create_task(self._tell(), name=f"script of {self.submission.rid}")
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._playing is not None:
            self._playing.cancel()
            with suppress(asyncio.CancelledError):
                await self._playing
        self.left_by = exc[1]
        self.left.set()

    async def _tell(self) -> None:
        async for event in self._play(self):
            self._hear(event)


class ScriptedGenerator:
    """`submitted` holds every generation in order; `refuse`, when set, is raised instead of admitting one."""

    def __init__(self, play: Play) -> None:
        self._play = play
        self.submitted: list[ScriptedGeneration] = []
        self.refuse: Exception | None = None
        self.arrival = asyncio.Event()

    def submit(self, submission: Submission, hear: Hear) -> ScriptedGeneration:
        if self.refuse is not None:
            raise self.refuse
        self.submitted.append(ScriptedGeneration(submission, self._play, hear))
        self.arrival.set()
        return self.submitted[-1]


def logprob_of(id: int, k: int) -> TokenLogprob:
    """A made-up log-probability: the chosen token first, its followers behind it."""
    return TokenLogprob(-0.5, 1, tuple((id + n, -0.5 - n) for n in range(k)))


def says(text: str | bytes, *, reason: FinishReason = FinishReason.STOP, eos: bool = True, piece: int = 1) -> Play:
    """Each choice gets the bytes of `text`, `piece` ids an event, then end-of-sequence; stopped choices get no more."""
    raw = text.encode() if isinstance(text, str) else text

    async def play(generation: ScriptedGeneration) -> AsyncIterator[GenerationEvent]:
        params = generation.submission.params
        ids = [*raw, *([EOS] if eos else [])][: params.max_tokens]
        for choice in range(len(generation.submission.seeds)):
            for at in range(0, len(ids), piece):
                if choice in generation.stopped:
                    break
                some = tuple(ids[at : at + piece])
                k = params.logprobs
                yield Tokens(choice, at, some, () if k is None else tuple(logprob_of(id, k) for id in some))
                await asyncio.sleep(0)
            yield Finished(choice, reason)
        yield Done(cached_tokens=generation.cached_tokens, stages={"prefill": 0.1})

    return play


async def silent(generation: ScriptedGeneration) -> AsyncIterator[GenerationEvent]:
    """Never says anything."""
    await asyncio.Event().wait()
    yield Done()


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are bytes; 256 is end-of-sequence, 257 begin-of-sequence, both special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte_of_char().__getitem__)
    backend = Backend(models.BPE(vocab={char: n for n, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<s>", special=True)])
    return Tokenizer(backend, {"eos_token": "</s>", "bos_token": "<s>"})


def _byte_of_char() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def facts(**changes: Any) -> ModelFacts:
    fields: dict[str, Any] = {
        "max_model_len": 512,
        "vocab_size": 258,
        "eos_ids": frozenset({EOS}),
        "defaults": GenerationDefaults(),
        "chat_templates": {"default": TEMPLATE},
    }
    return ModelFacts(**{**fields, **changes})


async def no_request(rid: str) -> Mapping[str, object] | None:
    return None


def router_parts(generator: ScriptedGenerator, **changes: Any) -> RouterParts:
    fields: dict[str, Any] = {
        "generator": generator,
        "tokenizer": byte_tokenizer(),
        "facts": facts(),
        "model_names": (MODEL, "alias"),
        "http": HttpSettings(),
        "routing": RoutingSettings(),
        "read_request": no_request,
        "why_not_ready": lambda: "",
    }
    return RouterParts(**{**fields, **changes})


def in_process(generator: ScriptedGenerator, **changes: Any) -> httpx.AsyncClient:
    """A client of the application itself, without a socket: quick, and blind to streaming."""
    app = create_app(router_parts(generator, **changes))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router")


@asynccontextmanager
async def served(generator: ScriptedGenerator, **changes: Any) -> AsyncGenerator[int, None]:
    """The router's HTTP side on a free port of 127.0.0.1."""
    sock = bind("127.0.0.1", 0)
    port = port_of(sock)
    async with serving(create_app(router_parts(generator, **changes)), sock, protocol=RouterProtocol):
        yield port


def prompt_text(ids: Sequence[int]) -> str:
    return bytes(id for id in ids if id < EOS).decode()
