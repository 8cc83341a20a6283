"""`make simulate`: what it prints, and that a failing run can be played again from what it says."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator

import pytest

from simulation.__main__ import main


@pytest.fixture(autouse=True)
def logs_again() -> Iterator[None]:
    """The command switches logging off for good."""
    yield
    logging.disable(logging.NOTSET)


def test_it_counts_messages_moves_and_misfortunes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "16"]) == 0
    printed = capsys.readouterr().out
    for expected in ("message\n", "request table\n", "failure: ", "16 runs", "0 broke an invariant"):
        assert expected in printed


@pytest.mark.parametrize(
    "words",
    [
        ["--seeds", "60", "--profile", "lossy", "--off", "router.index_once"],
        ["--seeds", "0", "--singles", "--off", "router.index_once"],
    ],
)
def test_a_run_that_breaks_is_shown_with_its_events_and_the_command_that_replays_it(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--stop-after", "1"]) == 1
    printed = capsys.readouterr().out
    (command,) = [line.strip() for line in printed.splitlines() if line.strip().startswith("make simulate SEED=")]
    assert "VIOLATION" in printed

    _, _, seed, *arguments = shlex.split(command)
    replay = ["--replay", seed.removeprefix("SEED="), *shlex.split(" ".join(arguments).removeprefix("ARGS="))]
    assert main(replay) == 1
    assert "tokens_are_gapless_and_as_undisturbed" in capsys.readouterr().out
