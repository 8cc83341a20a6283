"""docs/metrics.md says of every series what the table says, and of no other."""

from __future__ import annotations

import re
from pathlib import Path

from splitserve.telemetry.families import Family, Series, families
from splitserve.telemetry.legacy import LEGACY

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
TABLE = families(2048)


def rows(title: str) -> list[list[str]]:
    """Cells of the table rows under the headings that contain `title`."""
    sections = [part for part in PAGE.split("\n## ") if title in part.partition("\n")[0]]
    lines = [line for part in sections for line in part.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def described() -> list[list[str]]:
    return [row for title in ("Requests:", "HTTP:", "Engines:", "KV on", "Every process") for row in rows(title)]


def shown(family: Family, series: Series) -> str:
    labels = ",".join(f'{label}="{value}"' for label, value in zip(family.labels, series.values))
    return f"{family.name}{{{labels}}}" if labels else family.name


def test_every_family_stands_in_the_page_once_with_its_owner() -> None:
    told = sorted((row[0].strip("`"), row[1]) for row in described())
    assert told == sorted((family.name, family.owner.value) for family in TABLE)


def test_each_row_says_what_moves_it() -> None:
    assert [row[0] for row in described() if len(row[2]) < 8] == []


def test_the_labels_of_a_family_are_named_in_its_row() -> None:
    told = {row[0].strip("`"): " ".join(row[1:]) for row in described()}
    for family in TABLE:
        if family.name != "vllm:cache_config_info":
            assert [label for label in family.labels if f"`{label}`" not in told[family.name] and label != "sleep_state"] == [], family.name  # fmt: skip


def test_constants_stand_there_with_their_value_and_why() -> None:
    expected = {
        (shown(family, series), f"{series.value:g}", series.constant)
        for family in TABLE
        for series in family.known
        if series.constant
    }
    assert {(row[0].strip("`"), row[1], row[2].rstrip(" |")) for row in rows("never move")} == expected


def test_what_moves_only_when_something_happens_stands_there() -> None:
    told = {(re.findall(r"`([^`]+)`", row[0])[0], row[1].rstrip(" |")) for row in rows("undisturbed")}
    assert told == {(f.name, series.rare) for f in TABLE for series in f.known if series.rare}


def test_older_names_stand_there() -> None:
    assert {row[0].strip("`") for row in rows("Older names")} == {legacy.name for legacy in LEGACY}
