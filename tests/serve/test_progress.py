from __future__ import annotations

import io
import re

from splitserve.serve.progress import PlainProgress, TerminalProgress, progress_on


def test_elsewhere_than_on_a_terminal_each_event_is_one_line_and_none_comes_twice() -> None:
    out = io.StringIO()
    progress = progress_on(out)
    assert isinstance(progress, PlainProgress)
    progress.doing("model", "downloading")
    progress.doing("model", "downloading")
    progress.doing("prefill-0", "prefill-0 is loading")
    progress.done("model", "model is there")
    progress.close()
    progress.say("ready")
    lines = out.getvalue().splitlines()
    assert [re.sub(r"^\[ *\d+\.\d s\] ", "", line) for line in lines] == [
        "downloading",
        "prefill-0 is loading",
        "model is there",
        "ready",
    ]


def test_on_a_terminal_finished_steps_stay_and_the_spinner_goes() -> None:
    out = io.StringIO()
    progress = TerminalProgress(out, force=True)
    progress.doing("model", "downloading")
    progress.done("model", "model is there")
    progress.doing("router", "router is starting")
    progress.close()
    progress.say("curl 'http://[::1]/' # [not markup]")
    shown = out.getvalue()
    assert "✓" in shown
    assert "model is there" in shown
    assert shown.rstrip().endswith("curl 'http://[::1]/' # [not markup]")
