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

from bench import page, results
from bench.parts import PARTS
from bench.processes import stop_on_sigterm
from bench.results import ROOT, About
from splitserve.config import ModelSettings
from splitserve.model.resolve import resolve


def main() -> None:
    named, arguments = sys.argv[1:2], sys.argv[2:]
    if unknown := [part for part in named if part not in {*PARTS, "page"}]:
        sys.exit(f"there is no part {unknown[0]!r}: {', '.join(PARTS)} or page")
    stop_on_sigterm()
    try:
        codes = [measure(part, arguments) for part in named or PARTS if part in PARTS]
    finally:  # a run cut short leaves what it had
        page.write()
    sys.exit(max(codes, default=0))


def measure(name: str, arguments: Sequence[str]) -> int:
    """Run one part and keep what it found, also where it says by its exit status that a bar was missed; that status."""
    part, asked = PARTS[name], arguments
    if part.model is not None and not any(argument in arguments for argument in (part.model, "--help") if argument):
        model = str(resolve(ModelSettings()))
        arguments = [*([part.model] if part.model else []), model, *arguments]
    if not part.script:
        importlib.import_module(f"bench.{name}").main(arguments)
        return 0
    about = About.now(results.command(name, asked))
    status, lines = _run([sys.executable, "-u", str(Path(__file__).parents[1] / f"{name}.py"), *arguments])
    printed = "\n".join(line for line in lines if not line.startswith("{"))
    # a part that could not even begin leaves what was measured before
    if printed.strip() and "--help" not in arguments:
        results.write(name, {**about.fields(), "printed": printed})
    return status


def _run(command: Sequence[str]) -> tuple[int, list[str]]:
    """Its exit status and its lines, which are shown as they come."""
    roots = os.pathsep.join(str(ROOT / root) for root in ("services", "shared", "tests", "benchmarks"))
    lines: list[str] = []
    environment = os.environ | {"PYTHONPATH": roots}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as ran:
        try:
            for line in ran.stdout or ():
                print(line, end="", flush=True)
                lines.append(line.rstrip("\n"))
        except BaseException:
            ran.terminate()
            raise
    return ran.returncode, lines


if __name__ == "__main__":
    main()
