"""A compose stack in tests, started with the script that a newcomer starts it with, on free ports and under a name of its own."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.processes import ROOT
from support.servers import free_port

SCRIPT = ROOT / "compose" / "stack.sh"
IMAGE = "splitserve:test"
UP_S = 1500  # the first time it builds the image
COMMAND_S = 600


def engine_missing() -> str:
    """Why no stack can be started here; empty when one can."""
    try:
        asked = subprocess.run(["docker", "info"], capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        return "docker is not installed"
    except subprocess.TimeoutExpired:
        return "docker info does not answer"
    return "" if asked.returncode == 0 else "no Docker engine answers"


@dataclass(frozen=True, slots=True)
class Stack:
    """`environ` wins over the file of settings that the script writes."""

    name: str
    environ: dict[str, str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.environ['PORT']}"

    def run(self, *arguments: str, within_s: float = COMMAND_S) -> str:
        """`compose/stack.sh …`; what it said. RuntimeError with all of that when it failed."""
        done = subprocess.run(
            [str(SCRIPT), *arguments],
            env={**os.environ, **self.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=within_s,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def compose(self, *arguments: str) -> str:
        return self.run("compose", *arguments)

    def scale(self, **counts: int) -> None:
        """`scale(prefill=3)`; returns when the engine has started or stopped what it takes."""
        wanted = [word for phase, count in counts.items() for word in ("--scale", f"{phase}={count}")]
        self.compose("up", "-d", "--no-build", *wanted)

    def containers(self, service: str) -> list[str]:
        """Ids of a service's running containers."""
        return self._ids("ps", "--quiet", "--filter", f"label=com.docker.compose.service={service}")

    def logs(self, service: str) -> str:
        return self.compose("logs", "--no-color", service)

    def left(self) -> dict[str, list[str]]:
        """Ids of all that the engine still has of this stack, by kind; without the kinds of which there is nothing."""
        kinds = {
            "containers": self._ids("ps", "--all", "--quiet"),
            "networks": self._ids("network", "ls", "--quiet"),
            "volumes": self._ids("volume", "ls", "--quiet"),
        }
        return {kind: ids for kind, ids in kinds.items() if ids}

    def published(self) -> set[str]:
        """Services with a port that is open outside of the engine."""
        lines = docker(
            "ps", "--filter", self._mine, "--format", '{{.Label "com.docker.compose.service"}}\t{{.Ports}}'
        ).splitlines()
        return {service for service, _, ports in (line.partition("\t") for line in lines) if "->" in ports}

    def query(self, expression: str, *, federation: bool = False) -> dict[tuple[tuple[str, str], ...], float]:
        """The present values of a PromQL expression, by their labels."""
        port = self.environ["FEDERATION_PORT" if federation else "PROMETHEUS_PORT"]
        question = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{question}", timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
        return {
            tuple(sorted(sample["metric"].items())): float(sample["value"][1]) for sample in found["data"]["result"]
        }

    def up_targets(self) -> dict[str, int]:
        """Targets that answered the last scrape, by job."""
        return {dict(labels)["job"]: int(count) for labels, count in self.query("count by (job) (up == 1)").items()}

    @property
    def _mine(self) -> str:
        return f"label=com.docker.compose.project={self.name}"

    def _ids(self, *command: str) -> list[str]:
        return docker(*command, "--filter", self._mine).split()


def docker(*arguments: str) -> str:
    return subprocess.run(
        ["docker", *arguments], stdout=subprocess.PIPE, text=True, timeout=COMMAND_S, check=True
    ).stdout


@contextmanager
def running_stack(folder: Path, name: str, network: str, **settings: str) -> Generator[Stack, None, None]:
    """A stack on the federation network `network`, which has to exist; removed afterwards with its volumes."""
    environ = {
        "ENV_FILE": str(folder / f"{name}.env"),
        "COMPOSE_PROJECT_NAME": name,
        "COMPOSE_FILE": "docker-compose.yml:docker-compose.federation.yml",
        "FEDERATION_NETWORK": network,
        "SPLITSERVE_IMAGE": IMAGE,
        "DTYPE": "float32",
        "KV_CACHE_MEMORY_BYTES": "192MiB",
        "SPLIT": "always",
        "VOLUMES": "1",
        **{port: str(free_port()) for port in ("PORT", "PROMETHEUS_PORT", "FEDERATION_PORT")},
        **settings,
    }
    stack = Stack(name, environ)
    try:
        stack.run("up", within_s=UP_S)
        yield stack
    finally:
        stack.run("down")
