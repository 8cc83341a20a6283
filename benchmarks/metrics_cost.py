"""What metric calls cost beside a decode step of 64 sequences.

    python benchmarks/metrics_cost.py [--model FOLDER_OR_ID] [--batch 64] [--context 128] [--steps 20] [--json]

The step is real: a model on this CPU, float32, one thread, the median of `--steps` decode steps. The calls are those that
such a step makes: the worker's `StepMetrics.on_batch` once, and at the router `gap` once a sequence, told by a `flush`. Ends
with 1 when the two together are over 1 % of the step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from splitserve.config import EngineSettings, ModelSettings
from splitserve.engine import door
from splitserve.engine.build import build_engine
from splitserve.engine.loader import LoadedModel, load_model
from splitserve.model.resolve import resolve
from splitserve.protocol.params import SamplingParams
from splitserve.protocol.states import Role
from splitserve.router.metrics import RouterMetrics
from splitserve.router.observers import Observers
from splitserve.telemetry.metrics import Metrics
from splitserve.worker.estimates import Estimator
from splitserve.worker.facts import sizes_of
from splitserve.worker.observe import StepMetrics

LIMIT = 0.01
CALLS = 2000
MODEL_LEN = 8192


@dataclass(frozen=True)
class Cost:
    """Medians. `share`: of both together in the step."""

    batch: int
    context: int
    step_ms: float
    worker_us: float
    router_us: float
    share: float


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    model = ModelSettings(model=options.model, dtype="float32")
    loaded = load_model(resolve(model), model=model, engine=EngineSettings(device="cpu", threads=1))
    batches = decode_batches(loaded, options.batch, options.context, options.steps)
    step_s = statistics.median(batch.stats.seconds for batch in batches if batch.stats)
    worker_s, router_s = worker_seconds(loaded, batches[-1]), router_seconds(options.batch)
    cost = Cost(
        options.batch, options.context, step_s * 1e3, worker_s * 1e6, router_s * 1e6, (worker_s + router_s) / step_s
    )
    print(json.dumps(asdict(cost)) if options.json else table(cost))
    return int(cost.share > LIMIT)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="empty: the model that `splitserve serve` starts with")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def decode_batches(loaded: LoadedModel, batch: int, context: int, steps: int) -> list[door.Batch]:
    """What `steps` steps gave in which all of `batch` sequences decoded, each behind a prompt of `context` tokens."""
    settings = EngineSettings(max_num_batched_tokens=2048, max_num_seqs=batch, enable_prefix_caching=False)
    blocks = batch * -(-(context + steps + 4) // settings.block_size) + 1
    engine = build_engine(loaded, None, None, blocks, settings, "prefill", time.monotonic)
    params = SamplingParams(max_tokens=steps + 4, ignore_eos=True)
    for key in range(batch):
        ids = tuple((key * 131 + at * 17) % 1000 + 10 for at in range(context))
        engine.submit(door.Add(key, door.Mode.LOCAL, ids, context, ((),), params, (key,)))
    found: list[door.Batch] = []
    while len(found) < steps and engine.has_work:
        done = engine.step()
        if done is not None and done.stats is not None and done.stats.decode_tokens == batch:
            found.append(done)
    if not found:
        raise SystemExit(f"no step decoded all of {batch} sequences")
    return found


def worker_seconds(loaded: LoadedModel, batch: door.Batch) -> float:
    metrics = Metrics(Role.DECODE, model_name="m", engine="d-0", max_model_len=MODEL_LEN)
    steps = StepMetrics(metrics, Estimator(sizes_of(loaded)))
    return median_seconds(lambda: steps.on_batch(batch))


def router_seconds(batch: int) -> float:
    observers = Observers(RouterMetrics(model_name="m", engine="r-0", max_model_len=MODEL_LEN))
    request = observers.request("/v1/completions")

    def gaps() -> None:
        for _ in range(batch):
            request.gap(0.03)
        observers.flush()

    return median_seconds(gaps)


def median_seconds(call: Callable[[], None]) -> float:
    def once() -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return statistics.median(once() for _ in range(CALLS))


def table(cost: Cost) -> str:
    return "\n".join(
        (
            f"decode step, {cost.batch} sequences of {cost.context} tokens: {cost.step_ms:8.2f} ms",
            f"metric calls at the worker, per step:        {cost.worker_us:8.1f} us",
            f"metric calls at the router, per step:        {cost.router_us:8.1f} us",
            f"together:                                    {cost.share:8.2%} of the step (limit {LIMIT:.0%})",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
