"""The house, file by file: docs/house.md is the first sentence of every module. Run to print it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAD = """# The house, file by file

The first sentence of each module, room by room; [architecture.md](architecture.md) says what a room is for. Written by
`PYTHONPATH=tests .venv/bin/python -m support.house > docs/house.md`; a test says when that is due.
"""


def first_sentence(module: Path) -> str:
    """Of a module's docstring, without its full stop. ValueError for a module that says nothing of itself."""
    said = ast.get_docstring(ast.parse(module.read_text()))
    if not said:
        raise ValueError(f"{module} has no docstring: its first sentence stands in docs/house.md")
    paragraph = " ".join(said.split("\n\n")[0].split())
    found = re.match(r"(.+?)\.(?:\s|$)", paragraph)
    return (found[1] if found else paragraph).rstrip(":")


def page() -> str:
    """All of docs/house.md."""
    parts = [HEAD]
    for root in ("services", "shared"):
        house = ROOT / root / "splitserve"
        modules = sorted(house.rglob("*.py"), key=lambda path: (path.parent, path.name))
        for room in dict.fromkeys(module.parent for module in modules):
            lines = [f"- `{m.stem}`: {first_sentence(m)}" for m in modules if m.parent == room]
            parts.append(f"## {room.relative_to(ROOT)}\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
