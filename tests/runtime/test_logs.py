from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from splitserve.config import LogSettings
from splitserve.runtime.logs import set_up_logs


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("splitserve")
    before = (root.handlers[:], root.level, ours.level)
    yield
    root.handlers[:], level, ours_level = before
    root.setLevel(level)
    ours.setLevel(ours_level)


def test_an_event_is_one_json_line_with_its_fields() -> None:
    out = io.StringIO()
    set_up_logs(LogSettings(log_format="json"), "decode-0", out)
    logging.getLogger("splitserve.decode").info("job accepted", extra={"rid": "r1", "slot": 3})
    line = json.loads(out.getvalue())
    assert (line["event"], line["rid"], line["slot"], line["process"]) == ("job accepted", "r1", 3, "decode-0")


def test_text_has_the_fields_behind_the_event() -> None:
    out = io.StringIO()
    set_up_logs(LogSettings(log_format="text"), "decode-0", out)
    logging.getLogger("splitserve.decode").warning("bus down", extra={"connection": "beats"})
    assert out.getvalue().endswith("warning decode-0 splitserve.decode: bus down connection=beats\n")


def test_the_level_is_obeyed() -> None:
    out = io.StringIO()
    set_up_logs(LogSettings(log_level="warning"), "x", out)
    logging.getLogger("splitserve.a").info("quiet")
    assert out.getvalue() == ""


def test_a_traceback_stays_with_its_event() -> None:
    out = io.StringIO()
    set_up_logs(LogSettings(log_format="json"), "x", out)
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("splitserve.a").exception("step failed", extra={"rid": "r1"})
    line = json.loads(out.getvalue())
    assert "ValueError: boom" in line["traceback"]
