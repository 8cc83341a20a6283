"""Engines over torch models, and the plain way to get all tokens out of one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from splitserve.config import EngineSettings, ModelSettings
from splitserve.engine import door
from splitserve.engine.build import build_engine
from splitserve.engine.engine import Engine
from splitserve.engine.loader import LoadedModel, load_model
from splitserve.protocol.params import SamplingParams, TokenLogprob

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, logprobs=0)


def load(folder: Path, dtype: str = "float32", device: Literal["cpu", "cuda"] = "cpu", **model: object) -> LoadedModel:
    torch.set_num_threads(1)
    settings = ModelSettings.model_validate({"dtype": dtype, **model})
    return load_model(folder, model=settings, engine=EngineSettings(device=device, threads=1))


def engine_over(loaded: LoadedModel, *, chunk: int, blocks: int = 1024, prefix_caching: bool = True) -> Engine:
    settings = EngineSettings(max_num_batched_tokens=chunk, enable_prefix_caching=prefix_caching)
    return build_engine(loaded, None, None, blocks, settings, "prefill", time.monotonic)


@dataclass
class Answer:
    """All that an engine said to one job of one sequence."""

    ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    cached_tokens: int = 0


def answers(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams], seed: int = 1
) -> list[Answer]:
    """Run all prompts together, to the end; prompt i has seed `seed + i`."""
    given = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    out = [Answer() for _ in prompts]
    for i, (prompt, param) in enumerate(zip(prompts, given, strict=True)):
        engine.submit(door.Add(i, door.Mode.LOCAL, tuple(prompt), len(prompt), ((),), param, (seed + i,)))
    while engine.has_work:
        batch = engine.step()
        for event in batch.events if batch else ():
            if isinstance(event, door.TokenEvent):
                answer = out[event.key]  # type: ignore[call-overload]
                answer.ids += event.ids
                answer.logprobs += event.logprobs
                answer.cached_tokens += event.cached_tokens
            elif isinstance(event, door.Failed | door.Rejected):
                raise AssertionError(event.message)
    return out
