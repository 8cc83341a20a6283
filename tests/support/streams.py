"""Streams against a cluster, as a client sees them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from openai import AsyncOpenAI

PROMPTS = (
    "The history of the sea begins with",
    "def quicksort(items):\n",
    "My favourite recipe for bread needs",
    "In the year 2150 the first city on Mars",
    "Les trois mousquetaires étaient",
    "A list of ten animals: 1. cat 2. dog 3.",
    "Dear diary, today I learned that",
    "The theorem can be proved as follows.",
)
# with these, no draw of the first 48 at temperature 0.8 lies within 5e-4 of a CDF edge, where float32 rounding, which
# differs with the batch, may choose the other token (protocol D9)
SEEDS = (23, 23, 9, 26, 87, 16, 1, 24)


@dataclass
class Heard:
    """One stream: its text, how it ended, and the longest wait between two of its events, in seconds."""

    text: str = ""
    finish: str | None = None
    events: int = 0
    longest_gap_s: float = 0.0
    tokens: list[str] = field(default_factory=list[str])


async def listen(
    client: AsyncOpenAI, model: str, prompt: str, *, tokens: int, seed: int, heard: Heard | None = None
) -> Heard:
    """Stream one sampled completion to its end; `heard` is filled while it runs."""
    heard = heard or Heard()
    stream = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=tokens,
        temperature=0.8,
        seed=seed,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    last = time.monotonic()
    async for chunk in stream:
        now = time.monotonic()
        heard.longest_gap_s = max(heard.longest_gap_s, now - last)
        last = now
        heard.events += 1
        for choice in chunk.choices:
            heard.text += choice.text
            heard.finish = choice.finish_reason or heard.finish
    return heard
