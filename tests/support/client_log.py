"""A known load by the official client, and what that client saw of it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

from openai import APIStatusError, AsyncOpenAI, RateLimitError
from openai.types import CompletionUsage


@dataclass
class ClientLog:
    """Sums over answers that ended well; `ttfts` and `gaps` in seconds, of streams, as the client's clock saw them."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter[str])
    requests: int = 0
    refused: Counter[int] = field(default_factory=Counter[int])
    ttfts: list[float] = field(default_factory=list[float])
    gaps: list[float] = field(default_factory=list[float])
    stages: list[dict[str, float]] = field(default_factory=list[dict[str, float]])  # as usage tells them, of streams

    def add(self, usage: CompletionUsage | None, reasons: list[str]) -> None:
        """One request that was answered to its end."""
        assert usage is not None
        details = usage.prompt_tokens_details
        self.requests += 1
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += (details.cached_tokens or 0) if details else 0
        self.generation_tokens += usage.completion_tokens
        self.finished.update(reasons)


class Client:
    """Sends and logs. Answers have exactly the length asked for, unless a stop string ends them."""

    def __init__(self, url: str, model: str, key: str) -> None:
        self.api = AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)
        self.model = model
        self.log = ClientLog()

    async def whole(
        self, prompt: str | list[str] | list[int], tokens: int, *, n: int = 1, stop: str | None = None
    ) -> None:
        """One answer in one piece."""
        answer = await self.api.completions.create(
            model=self.model, prompt=prompt, max_tokens=tokens, n=n, seed=7, stop=stop, extra_body={"ignore_eos": True}
        )
        self.log.add(answer.usage, [choice.finish_reason for choice in answer.choices])

    async def stream(self, prompt: str, tokens: int, begun: asyncio.Semaphore | None = None) -> None:
        """One streamed answer; `begun` is released at its third event."""
        reasons: list[str] = []
        usage: CompletionUsage | None = None
        events, began = 0, time.monotonic()
        last = began
        chunks = await self.api.completions.create(
            model=self.model,
            prompt=prompt,
            max_tokens=tokens,
            seed=7,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, "include_stage_seconds": True},
        )
        async for chunk in chunks:
            usage = chunk.usage or usage
            if not chunk.choices:
                continue
            now = time.monotonic()
            reasons += [choice.finish_reason for choice in chunk.choices if choice.finish_reason]
            if any(choice.text for choice in chunk.choices):
                (self.log.gaps if events else self.log.ttfts).append(now - last)
                last = now
                events += 1
                if events == 3 and begun is not None:
                    begun.release()
        self.log.add(usage, reasons)
        self.log.stages.append(((usage and usage.model_extra) or {})["stage_seconds"])

    async def leave(self, prompt: str | list[int], tokens: int, *, events: int) -> None:
        """Open a stream and close it after so many events."""
        chunks = await self.api.completions.create(
            model=self.model, prompt=prompt, max_tokens=tokens, stream=True, extra_body={"ignore_eos": True}
        )
        async with chunks:
            async for chunk in chunks:
                events -= any(choice.text for choice in chunk.choices)
                if events <= 0:
                    return
        raise AssertionError(f"the answer of {tokens} tokens ended before it was left")

    async def refused(self, **changes: object) -> int:
        """Ask for something that is not taken; gives the HTTP status."""
        body: dict[str, object] = {"model": self.model, "prompt": "No", "max_tokens": 4, **changes}
        try:
            await self.api.completions.create(**body)  # type: ignore[call-overload]
        except APIStatusError as error:
            self.log.refused[error.status_code] += 1
            return error.status_code
        raise AssertionError(f"it was answered: {changes}")

    async def burst(self, prompts: list[list[int]], tokens: int) -> None:
        """All at once; those that are refused with 429 are logged as such."""

        async def one(prompt: list[int]) -> None:
            try:
                await self.whole(prompt, tokens)
            except RateLimitError:
                self.log.refused[429] += 1

        await asyncio.gather(*(one(prompt) for prompt in prompts))
