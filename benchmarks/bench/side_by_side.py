"""Clusters of ours beside one another, to be asked in turn."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench import load, peers
from bench.workloads import seed_of
from support.servers import free_port


@contextmanager
def side_by_side(model: Path, flags: Mapping[str, Sequence[str]]) -> Generator[dict[str, peers.Served]]:
    """One for each name, with these flags for `splitserve serve`, started and warmed up in this order."""
    with ExitStack() as stack:
        served: dict[str, peers.Served] = {}
        for name, given in flags.items():
            served[name] = stack.enter_context(peers.splitserve(model, free_port(), given))
            load.run(served[name].url, model, load.WARM_UP, seed_of("warm-up"))
        yield served
