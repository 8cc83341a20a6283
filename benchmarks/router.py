"""Core-milliseconds of the router's process a request: mock workers over a real NATS, 200 tokens in and 100 out, streamed.

    python benchmarks/router.py --model FOLDER [--concurrent 64 512] [--rounds 5] [--step-ms 20] [--requests 0]

Client, workers and router are processes of their own; only the router's CPU time is counted. A bare FastAPI stream of 100
frames is measured beside it in every round, as fast as it goes and at the pace of the steps. The bar is of a machine on which
the former took 2, so it is judged twice: in milliseconds of this machine's cores, and as a ratio. Medians with the least and
the greatest, ratios round by round, and the router's resident memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from bench.results import Spread, ratios
from support import servers
from support.processes import environment

HERE = Path(__file__).parent / "bench"
CLUSTER, SERVED = "bench", "mock"
DECODES = 2
BAR_MS = 5.0
BARE_MS = 2.0  # of the bare stream, on the machine that the bar is of
READY_S = 30.0
PROMPT = " ".join(["the"] * 200)  # a token a word


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="whose tokenizer is used")
    parser.add_argument("--concurrent", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--requests", type=int, default=0, help="in a run; 0: four times those at a time")
    given = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        nats, redis = servers.nats(folder), servers.redis(folder)
        for server in (nats, redis):
            stack.callback(server.kill)
            server.start()
        router_port, bare_port = servers.free_port(), servers.free_port()
        mock = [str(HERE / "mock_workers.py"), nats.url, CLUSTER, str(given.step_ms), str(DECODES)]
        stack.enter_context(child(mock))
        router = ["-m", "splitserve", "router", "--nats", nats.url, "--redis", redis.url, "--cluster", CLUSTER]
        router += ["--model", str(given.model), "--served-model-name", SERVED, "--port", str(router_port)]
        router += ["--name", "router-0", "--split", "always", "--log-level", "warning"]
        asked = {"router": (stack.enter_context(child(router)), router_port, "/v1/completions", body())}
        bare = stack.enter_context(child([str(HERE / "bare_stream.py"), str(bare_port), str(given.step_ms)]))
        asked["bare FastAPI"] = (bare, bare_port, "/", "")
        asked["bare, paced"] = (bare, bare_port, "/paced", "")
        wait(f"http://127.0.0.1:{router_port}/ready", asked["router"][0])
        wait(f"http://127.0.0.1:{bare_port}/", asked["bare FastAPI"][0])
        print(f"mock workers, a step {given.step_ms:g} ms; {given.rounds} rounds; core-milliseconds a request")
        for concurrent in given.concurrent:
            found: dict[str, list[float]] = {name: [] for name in asked}
            requests = given.requests or 4 * concurrent
            for _ in range(given.rounds):
                for name, (process, port, path, text) in asked.items():
                    found[name].append(cost_ms(process, port, path, concurrent, requests, text))
            for name, values in found.items():
                rss = asked[name][0].memory_info().rss / 2**20
                said = f"{concurrent:4} at a time  {name:13} {Spread.of(values)}  {rss:.0f} MiB resident"
                median = Spread.of(values).median
                print(
                    said + (f"  bar {BAR_MS:g}: {'met' if median < BAR_MS else 'missed'}" if name == "router" else "")
                )
            ratio = ratios(found["router"], found["bare FastAPI"])
            verdict = f"bar {BAR_MS:g} to {BARE_MS:g}: {'met' if ratio.median < BAR_MS / BARE_MS else 'missed'}"
            print(f"{concurrent:4} at a time  router to bare FastAPI {ratio}  {verdict}")


def body() -> str:
    fields = {"model": SERVED, "prompt": PROMPT, "max_tokens": 100, "stream": True, "ignore_eos": True}
    return json.dumps(fields)


@contextmanager
def child(arguments: Sequence[str]) -> Generator[psutil.Process, None, None]:
    """A Python process that is stopped at the end."""
    with subprocess.Popen([sys.executable, *arguments], env=environment()) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.terminate()


def wait(url: str, process: psutil.Process) -> None:
    """Until the page answers. RuntimeError when its process ends first, TimeoutError after READY_S."""
    give_up = time.monotonic() + READY_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).read()
            return
        except (urllib.error.URLError, OSError) as error:
            if process.status() == psutil.STATUS_ZOMBIE:
                raise RuntimeError(f"what should answer at {url} has ended") from error
            if time.monotonic() > give_up:
                said = error.read().decode() if isinstance(error, urllib.error.HTTPError) else ""
                raise TimeoutError(f"{url} did not answer in {READY_S:g} s: {error} {said}") from error
            time.sleep(0.1)


def cost_ms(process: psutil.Process, port: int, path: str, concurrent: int, requests: int, text: str) -> float:
    """CPU milliseconds of the process a request. RuntimeError when a stream failed."""
    command = [sys.executable, str(HERE / "stream_client.py"), str(port), path, str(concurrent), str(requests), text]
    before = process.cpu_times()
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    after = process.cpu_times()
    if failed := json.loads(ran.stdout)["failed"]:
        raise RuntimeError(f"{failed} of {requests} streams failed at port {port}")
    return 1e3 * (after.user + after.system - before.user - before.system) / requests


if __name__ == "__main__":
    main()
