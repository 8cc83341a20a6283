"""Writes dashboards/*.json: `python compose/grafana/make_dashboards.py [FOLDER]` after a change here (needs the extra `dev`)."""

from __future__ import annotations

import sys
from pathlib import Path

from panels import as_json
from vllm import PERFORMANCE, QUERY
from way import WAY


def write(folder: Path) -> None:
    for dashboard in (PERFORMANCE, QUERY, WAY):
        (folder / f"{dashboard.uid}.json").write_text(as_json(dashboard))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "dashboards")
