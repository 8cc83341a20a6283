"""`python -m bench [PART] [ARGUMENTS]`: measure one part, or all, then write docs/benchmarks.md from all that was measured.

`make bench` is this; PART=page only writes the page.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import page
from bench.parts import PARTS
from bench.results import ROOT, save
from splitserve.config import ModelSettings
from splitserve.model.resolve import resolve


def main() -> None:
    named, arguments = sys.argv[1:2], sys.argv[2:]
    for part in named or PARTS:
        if part in PARTS:
            measure(part, arguments)
        elif part != "page":
            sys.exit(f"there is no part {part!r}: {', '.join(PARTS)} or page")
    page.write()


def measure(name: str, arguments: Sequence[str]) -> None:
    """Run one part and keep what it found. The process ends where the part fails."""
    part = PARTS[name]
    if part.model is not None and not any(argument in arguments for argument in (part.model, "--help") if argument):
        model = str(resolve(ModelSettings()))
        arguments = [*([part.model] if part.model else []), model, *arguments]
    if not part.script:
        importlib.import_module(f"bench.{name}").main(arguments)
        return
    roots = os.pathsep.join(str(ROOT / root) for root in ("services", "shared", "tests", "benchmarks"))
    command = [sys.executable, str(Path(__file__).parents[1] / f"{name}.py"), *arguments]
    ran = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": roots}, check=False
    )
    print(ran.stdout)
    if ran.returncode:
        sys.exit(ran.returncode)
    save(name, {"printed": "\n".join(line for line in ran.stdout.splitlines() if not line.startswith("{"))})


if __name__ == "__main__":
    main()
