"""Milliseconds of engine steps on this CPU: decodes of 1, 16, 32 at a context of 288, prompts of 256 and 1,024 tokens.

`python benchmarks/engine_cpu.py MODEL_FOLDER [--repeats 15] [--threads 1] [--block-size 16]`: torch, attention by the compiled
kernels, and each layer as one call are timed in turn, round by round, so that a busy moment falls on all of them; medians and
quartiles are printed, with the linear layers alone, as oneDNN does them, as what torch cannot go below.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from splitserve.config import EngineSettings, ModelSettings
from splitserve.engine.attention.base import AttentionBackend
from splitserve.engine.attention.native_backend import NativeBackend
from splitserve.engine.batch import StepRow
from splitserve.engine.forward import PagedModel
from splitserve.engine.fused import Fusion
from splitserve.engine.linear import PackedLinear
from splitserve.engine.loader import LoadedModel, load_model
from splitserve.engine.native import library
from splitserve.kv.segment import Segment
from splitserve.kv.storage import KvStorage
from splitserve.model.resolve import cache_folder

CONTEXT = 288
CASES = {"decode b=1": 1, "decode b=16": 16, "decode b=32": 32, "prefill 256": -256, "prefill 1024": -1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--block-size", type=int, default=16)
    arguments = parser.parse_args()
    block = arguments.block_size
    settings = EngineSettings(device="cpu", threads=arguments.threads, block_size=block, attention_backend="torch")
    loaded = load_model(arguments.model, model=ModelSettings(dtype="bfloat16"), engine=settings)
    library.load(library.build(cache_folder(ModelSettings())))
    native = NativeBackend(block, torch.bfloat16)
    fused = Fusion.of(loaded.model, loaded.layers).tried_on(loaded.model)
    ways: dict[str, tuple[AttentionBackend[Any], PreTrainedModel]] = {
        "torch": (loaded.backend, loaded.model),
        "attention": (native, loaded.model),
        "layers": (native, fused),
    }
    print(f"{loaded.name}, {loaded.dtype}, {arguments.threads} threads, {arguments.repeats} repeats; milliseconds")
    for name, size in CASES.items():
        runs = {"linears alone": _linears(loaded, abs(size))} | {
            way: _steps(loaded, model, backend, size) for way, (backend, model) in ways.items()
        }
        for run in runs.values():
            run()
        times: dict[str, list[float]] = {label: [] for label in runs}
        for _ in range(arguments.repeats):
            for label, run in runs.items():
                started = time.perf_counter()
                run()
                times[label].append((time.perf_counter() - started) * 1e3)
        for label, found in times.items():
            low, median, high = statistics.quantiles(found, n=4)
            print(f"{name:14} {label:14} {median:8.1f}  [{low:.1f}, {high:.1f}]  fastest {min(found):.1f}")


def _steps(
    loaded: LoadedModel, model: PreTrainedModel, backend: AttentionBackend[Any], size: int
) -> Callable[[], object]:
    block = loaded.layout.block_tokens
    blocks = -(-max(CONTEXT + 1, abs(size)) // block)
    rows: Sequence[StepRow]
    if size > 0:
        tables = [[list(range(i * blocks, (i + 1) * blocks))] for i in range(size)]
        rows = [StepRow([7], CONTEXT - 1, table) for table in tables]
    else:
        rows = [StepRow(list(range(-size)), 0, [list(range(blocks))])]
    count = max(size, 1) * blocks
    segment = Segment.create(  # shared or not as its worker's
        count, loaded.layout.block_bytes, loaded.layout.digest, 1, shared=size < 0
    )
    segment.close()
    storage = KvStorage(loaded.layout, count, segment.pool)
    paged = PagedModel(model, loaded.layers, backend, storage)
    keep = list(range(size)) if size > 0 else [-size - 1]
    return lambda: paged.logits(rows, max(size, 0), keep)


def _linears(loaded: LoadedModel, rows: int) -> Callable[[], object]:
    """Every packed linear of the model once; the head's rows are few, as in a step."""
    dtype = next(loaded.model.parameters()).dtype
    layers = [
        (module, torch.randn(1 if "head" in name and rows > 32 else rows, module.in_features).to(dtype))
        for name, module in loaded.model.named_modules()
        if isinstance(module, PackedLinear)
    ]

    @torch.inference_mode()
    def run() -> None:
        for module, x in layers:
            module(x)

    return run


if __name__ == "__main__":
    main()
