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

NEW_TOKENS = 10
CLOSE_CALL = 1e-4  # where the two best logits are nearer than this, float32 rounding may choose (protocol D9)
LONGEST = 2000
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
    """Of every prompt of `support.prompts`, computed by one of the run's processes: a minute on two cores."""
    kept = run_folder / f"references-{folder.name}.json"
    with locked(kept.with_suffix(".lock"), _PATIENCE_S):
        if not kept.exists():
            kept.write_text(json.dumps([asdict(each) for each in _references(folder)]))
    return tuple(Reference(**each) for each in json.loads(kept.read_text()))


def _references(folder: Path) -> tuple[Reference, ...]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return tuple(_reference(model, tokenizer.encode(text).ids[-LONGEST:]) for text in texts())


def _reference(model: Any, prompt: list[int]) -> Reference:
    given = torch.tensor([prompt])
    out = model.generate(
        given,
        attention_mask=torch.ones_like(given),  # else it hides what looks like padding in the prompt
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = out.sequences[0, len(prompt) :]
    logits = torch.stack(out.logits, 1)[0]
    best = logits.topk(2).values
    logprobs = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    return Reference(prompt, ids.tolist(), logprobs.tolist(), (best[:, 0] - best[:, 1]).tolist())
