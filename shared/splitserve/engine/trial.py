"""Which format a CPU computes a bfloat16 checkpoint in, where our kernels do not run: the one that a trial shows to be faster.

Tried once a machine and kept in the user's cache, so that the workers of a machine agree: KV of two formats cannot be exchanged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

from splitserve.engine.linear import PackedLinear, packing_refusal
from splitserve.model.lock import locked

_log = logging.getLogger("splitserve.engine")

_WIDTH = 2048  # of the square weight that is tried: larger than caches next to a core, as models' are
_WORK = {16: 4, 128: 2}  # rows of a product: how often 256 tokens of prompt and 64 of answer, in a batch of 16, need it
_REPEATS = 3
_TIMEOUT_S = 60.0

Times = dict[str, float]


def bfloat16_is_faster(cache: Path, measure: Callable[[], Times] | None = None) -> bool:
    """Whether products in bfloat16 take less time here than in float32. Blocks, the first time, for up to a second or so.

    Where `cache` cannot be written nothing is tried, and it is False: workers that tried on their own might differ.
    """
    # names and flags, no counts of cores: those may differ between the workers of a machine
    cpu = sorted((name, value) for name, value in torch.cpu.get_capabilities().items() if isinstance(value, bool | str))
    named = repr((cpu, torch.__version__, os.environ.get("ONEDNN_MAX_CPU_ISA")))
    kept = cache / "trials" / f"bfloat16-{hashlib.sha256(named.encode()).hexdigest()[:16]}.json"
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with locked(kept.with_suffix(".lock"), _TIMEOUT_S):
            times = _kept(kept)
            if times is None:
                times = (measure or seconds_by_format)()
                _keep(kept, times)
    except OSError as error:  # TimeoutError is one
        _log.warning("which format is faster was not tried: float32 is taken", extra={"reason": str(error)})
        return False
    return times["bfloat16"] < times["float32"]


def seconds_by_format() -> Times:
    """Seconds of the same products in both formats, the least of some repeats, tried in turn."""
    least: Times = {}
    with torch.inference_mode(), torch.random.fork_rng(devices=()):
        runs = {str(dtype).removeprefix("torch."): _products(dtype) for dtype in (torch.bfloat16, torch.float32)}
        for run in runs.values():
            run()
        for _ in range(_REPEATS):
            for name, run in runs.items():
                started = time.perf_counter()
                run()
                least[name] = min(least.get(name, float("inf")), time.perf_counter() - started)
    _log.info("formats were tried on this CPU", extra={f"{name}_s": round(s, 5) for name, s in least.items()})
    return least


def _products(dtype: torch.dtype) -> Callable[[], None]:
    weight = torch.randn(_WIDTH, _WIDTH).to(dtype)
    packed = packing_refusal(dtype) is None
    linear = PackedLinear(weight, None) if packed else partial(functional.linear, weight=weight)
    given = [(torch.randn(rows, _WIDTH).to(dtype), times) for rows, times in _WORK.items()]

    def run() -> None:
        for x, times in given:
            for _ in range(times):
                linear(x)

    return run


def _kept(path: Path) -> Times | None:
    """None where there is nothing, or what a power cut left of it."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _keep(path: Path, times: Times) -> None:
    """Written aside and renamed: a killed process leaves nothing that looks tried."""
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps(times))
    aside.rename(path)
