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
    if unknown := [part for part in named if part not in {*PARTS, "page"}]:
        sys.exit(f"there is no part {unknown[0]!r}: {', '.join(PARTS)} or page")
    codes = [measure(part, arguments) for part in named or PARTS if part in PARTS]
    page.write()
    sys.exit(max(codes, default=0))


def measure(name: str, arguments: Sequence[str]) -> int:
    """Run one part and keep what it found, also where it says by its exit status that a bar was missed; that status."""
    part = PARTS[name]
    if part.model is not None and not any(argument in arguments for argument in (part.model, "--help") if argument):
        model = str(resolve(ModelSettings()))
        arguments = [*([part.model] if part.model else []), model, *arguments]
    if not part.script:
        importlib.import_module(f"bench.{name}").main(arguments)
        return 0
    roots = os.pathsep.join(str(ROOT / root) for root in ("services", "shared", "tests", "benchmarks"))
    command = [sys.executable, str(Path(__file__).parents[1] / f"{name}.py"), *arguments]
    ran = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": roots}, check=False
    )
    print(ran.stdout)
    printed = "\n".join(line for line in ran.stdout.splitlines() if not line.startswith("{"))
    if printed.strip():  # a part that could not even begin leaves what was measured before
        save(name, {"printed": printed})
    return ran.returncode


if __name__ == "__main__":
    main()
