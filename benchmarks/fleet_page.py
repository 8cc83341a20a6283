"""What the fleet's page costs the router: pages cut as they come, carried for who came back, joined and written.

    python benchmarks/fleet_page.py [--workers 50] [--rounds 20]

The pages are real: each worker's own registry with all its families, its labelled series moved. The bus is not in it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

from splitserve.protocol.states import Role
from splitserve.router.exposition import OPENMETRICS, TEXT, written
from splitserve.router.federation import Federation
from splitserve.telemetry.families import Kind, Owner, families
from splitserve.telemetry.metrics import Metrics

TARGET_MS = 20.0
_OWNERS = {Role.PREFILL: Owner.PREFILL, Role.DECODE: Owner.DECODE, Role.ROUTER: Owner.ROUTER}


def page(role: Role, name: str, rng: random.Random) -> str:
    """A process's page after some work: every family of its role moved, two values of each label."""
    metrics = Metrics(role, model_name="SmolLM2-135M-Instruct", engine=name, max_model_len=8192)
    for family in families(8192):
        if family.owner not in (_OWNERS[role], Owner.ALL) and (family.owner is not Owner.WORKER or role is Role.ROUTER):
            continue
        for n in range(2 if family.labels else 1):
            labels = dict.fromkeys(family.labels, f"value-{n}")
            if family.kind is Kind.COUNTER:
                metrics.counter(family.name, **labels).inc(rng.randrange(1 << 20))
            elif family.kind is Kind.GAUGE:
                metrics.gauge(family.name, **labels).set(rng.random())
            elif family.kind is Kind.SUMMARY:
                metrics.summary(family.name, **labels).observe(rng.random())
            else:
                for _ in range(50):
                    metrics.histogram(family.name, **labels).observe(rng.random() * 20)
    return metrics.page().decode()


def timed(work: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median and worst milliseconds of CPU: what others do on this machine is not in it."""
    spent: list[float] = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        spent.append((time.process_time() - began) * 1000)
    return statistics.median(spent), max(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    rng = random.Random(7)
    roles = [Role.PREFILL if n % 2 else Role.DECODE for n in range(given.workers)]
    pages = [(f"{role}-{n}", page(role, f"{role}-{n}", rng)) for n, role in enumerate(roles)]
    own = page(Role.ROUTER, "router-0", rng)
    size = sum(len(text) for _, text in pages)
    lines = sum(text.count("\n") for _, text in pages)
    print(f"{len(pages)} workers' pages: {size / 1e6:.2f} MB, {lines} lines; the router's: {len(own) / 1e3:.0f} kB\n")

    fleet = Federation()

    def take(incarnation: int) -> None:
        for name, text in pages:
            fleet.took((name, incarnation), text)

    def show(kind: str) -> bytes:
        take(incarnation=1)
        return written(fleet.page(own), kind)

    rows = [("pull taken, page written as text", timed(lambda: show(TEXT), given.rounds))]
    rows.append(("the same as OpenMetrics", timed(lambda: show(OPENMETRICS), given.rounds)))
    take(incarnation=2)

    def show_carried() -> bytes:
        take(incarnation=2)
        return written(fleet.page(own), TEXT)

    rows.append(("the same text when every worker came back once", timed(show_carried, given.rounds)))
    print(f"{'':<50}{'median ms':>10}{'worst ms':>10}")
    for name, (median, worst) in rows:
        print(f"{name:<50}{median:>10.1f}{worst:>10.1f}")
    verdict = "under" if rows[0][1][0] < TARGET_MS else "OVER"
    print(f"\n{verdict} the target of {TARGET_MS:g} ms")


if __name__ == "__main__":
    main()
