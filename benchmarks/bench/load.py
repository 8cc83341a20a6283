"""One run of the peer's load generator, `vllm bench serve`, against any OpenAI endpoint."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers import NAME, VENV

_TIMEOUT_S = 900


@dataclass(frozen=True, slots=True)
class Load:
    """`rate`: Poisson arrivals a second; None: as many at a time as `concurrency` says. Tokens a prompt and an answer."""

    prompt: int
    output: int
    requests: int
    concurrency: int = 0
    rate: float | None = None
    prefix: int = 0  # tokens that all prompts begin with, beside `prompt`
    goodput: tuple[int, int] | None = None  # TTFT and TPOT in milliseconds that a request must keep


WARM_UP = Load(1024, 16, 4, 4)


def run(url: str, model: Path, load: Load, seed: int, *, all_answered: bool = True) -> dict[str, Any]:
    """The generator's own result. RuntimeError with its last lines when it failed, or a request where `all_answered`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(VENV / "bin" / "vllm"), "bench", "serve", "--base-url", url, "--model", NAME]
        command += ["--tokenizer", str(model), "--dataset-name", "random", "--ignore-eos", "--seed", str(seed)]
        command += ["--random-input-len", str(load.prompt), "--random-output-len", str(load.output)]
        command += ["--random-prefix-len", str(load.prefix), "--num-prompts", str(load.requests), "--disable-tqdm"]
        command += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99"]
        command += ["--save-result", "--save-detailed", "--result-dir", folder, "--result-filename", "result.json"]
        if load.concurrency:
            command += ["--max-concurrency", str(load.concurrency)]
        if load.rate is not None:
            command += ["--request-rate", f"{load.rate:g}"]
        if load.goodput is not None:
            command += ["--goodput", f"ttft:{load.goodput[0]}", f"tpot:{load.goodput[1]}"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=environment, check=False)
        path = Path(folder) / "result.json"
        if ran.returncode or not path.exists():
            raise RuntimeError(f"the load generator ended with {ran.returncode}: {ran.stderr[-500:]}")
        result = json.loads(path.read_text())
    if all_answered and result["completed"] != load.requests:
        raise RuntimeError(f"{result['completed']} of {load.requests} requests were answered by {url}")
    return result
