"""docs/protocol.md and docs/house.md tell what is built: they are held against the code, row by row."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from splitserve.errors import TABLE, StartupError
from splitserve.protocol.messages import MESSAGES
from splitserve.protocol.states import DecodeState, PrefillState, RequestState
from splitserve.protocol.subjects import Subjects
from splitserve.store.keys import Keys
from support.house import page

ROOT = Path(__file__).parents[1]


def rows(section: str) -> Iterator[list[str]]:
    """Cells of every table row of a section, heads left out."""
    text = (ROOT / "docs" / "protocol.md").read_text()
    (body,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE):
        for line in table.splitlines()[2:]:
            yield [cell.strip() for cell in line.strip("|").split("|")]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_message_is_told_with_all_its_fields() -> None:
    told = {quoted(name)[0]: quoted(names) for name, _, names, _ in rows("Messages")}
    assert told == {name: [field.name for field in fields(kind)] for name, kind in MESSAGES.items()}


def test_every_subject_is_told_and_carries_messages_that_there_are() -> None:
    of, prefix = Subjects("c"), "ss1.c."
    built = [of.worker_in("<wid>"), of.worker_kv("<wid>"), of.worker_lease("<wid>"), of.router_events("<router>")]
    built += [of.beat("<role>", "<id>"), of.metrics("<id>")]
    told = {quoted(subject)[0]: quoted(carried) for subject, _, carried in rows("Subjects")}
    assert list(told) == [subject.removeprefix(prefix) for subject in built]
    answers = {quoted(name)[0] for name, way, *_ in rows("Messages") if way == "answer"}
    assert {name for names in told.values() for name in names} | answers == MESSAGES.keys()


def test_every_state_is_told() -> None:
    told = {word for row in rows("States") for cell in row for word in quoted(cell)}
    assert {*RequestState, *PrefillState, *DecodeState} <= told


@pytest.mark.parametrize("row", tuple(rows("Numbers")), ids=lambda row: row[0].strip("`"))
def test_a_number_is_the_one_in_the_code(row: list[str]) -> None:
    (path,) = quoted(row[0])
    module, _, name = path.partition(".Limits.")
    if name:
        built = getattr(import_module(f"splitserve.{module}").Limits(), name)
    else:
        module, _, name = path.rpartition(".")
        built = getattr(import_module(f"splitserve.{module}"), name)
    assert float(row[1]) == built


def test_every_key_is_told() -> None:
    keys = Keys("c")
    assert [quoted(row[0])[0] for row in rows("Redis")] == [
        key.removeprefix("ss:c:") for key in (keys.request("<rid>"), keys.router("<id>"))
    ]


def test_each_failure_names_tests_that_there_are() -> None:
    built = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    named = [quoted(row[-1]) for row in rows("When something fails")]
    assert all(named)
    assert {test for tests in named for test in tests} <= built


def test_every_error_is_told_with_its_codes() -> None:
    told = [(*quoted(error), *quoted(code), http, leaves) for error, code, http, leaves in rows("Errors")]
    assert told == [
        (
            row.error.__name__,
            row.code,
            str(row.http_status),
            str(row.exit_code) if issubclass(row.error, StartupError) else "",
        )
        for row in TABLE
    ]


def test_every_module_has_its_line_in_the_house() -> None:
    assert (ROOT / "docs" / "house.md").read_text() == page(), page().splitlines()[3]


def test_links_between_the_pages_lead_somewhere() -> None:
    for document in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
