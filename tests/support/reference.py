"""What `transformers.generate` says in float32: the yardstick of the engine's and of the whole cluster's tests."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from splitserve.model.lock import locked
from support.prompts import texts

NEW_TOKENS = 8
CLOSE_CALL = 1e-4  # where the two best logits are nearer than this, float32 rounding may choose (protocol D9)
LONGEST = 2000
_SHORT = 64  # tokens of a prompt that is given to `generate` together with its like
_PATIENCE_S = 280.0


@dataclass(frozen=True)
class Reference:
    """Greedy ids, log-probability of each, and how far its second-best logit was below the best."""

    prompt: list[int]
    ids: list[int]
    logprobs: list[float]
    gaps: list[float]


@cache
def references(folder: Path, run_folder: Path) -> tuple[Reference, ...]:
    """Of every prompt of `support.prompts`, computed by one of the run's processes: half a minute."""
    kept = run_folder / f"references-{folder.name}.json"
    with locked(kept.with_suffix(".lock"), _PATIENCE_S):
        if not kept.exists():
            kept.write_text(json.dumps([asdict(each) for each in _references(folder)]))
    return tuple(Reference(**each) for each in json.loads(kept.read_text()))


def _references(folder: Path) -> tuple[Reference, ...]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [tokenizer.encode(text).ids[-LONGEST:] for text in texts()]
    short = [prompt for prompt in prompts if len(prompt) <= _SHORT]
    # one token of one prompt reads all weights: those that need little padding share the reading
    found = _generate(model, short) + [_generate(model, [prompt])[0] for prompt in prompts if len(prompt) > _SHORT]
    return tuple(sorted(found, key=lambda reference: prompts.index(reference.prompt)))


def _generate(model: Any, prompts: list[list[int]]) -> list[Reference]:
    """`generate` over prompts of one batch, padded on the left to the longest of them."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        ids,
        attention_mask=mask,  # else it hides what looks like padding in the prompt
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(out.logits, 1)
    chosen = out.sequences[:, longest:]
    best = logits.topk(2).values
    logprobs = logits.log_softmax(-1).gather(2, chosen[:, :, None])[:, :, 0]
    rows = zip(prompts, chosen.tolist(), logprobs.tolist(), (best[:, :, 0] - best[:, :, 1]).tolist(), strict=True)
    return [Reference(*row) for row in rows]
