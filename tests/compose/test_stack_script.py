"""compose/stack.sh as a newcomer meets it, with a `docker` that the test plays."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support.processes import ROOT

TOOLS = ("sh", "sed", "od", "tr", "mv", "date", "sleep", "getconf", "dirname", "cat")
ANSWERS = """#!/bin/sh
echo "$*" >>"$ASKED"
case "$*" in
  info) exit ${ENGINE:-0} ;;
  *"exec -T router"*) echo a-model; exit ${READY:-0} ;;
  *"port router"*) echo 127.0.0.1:8000 ;;
esac
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the script where nothing is on PATH but the shell's tools and what `answers` makes of docker."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).symlink_to(shutil.which(name) or name)

    def go(*arguments: str, docker: str = ANSWERS, **env: str) -> subprocess.CompletedProcess[str]:
        if docker:
            fake = tools / "docker"
            fake.write_text(docker)
            fake.chmod(0o755)
        return subprocess.run(
            [str(ROOT / "compose" / "stack.sh"), *arguments],
            env={"PATH": str(tools), "ENV_FILE": str(tmp_path / "env"), "ASKED": str(tmp_path / "asked"), **env},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    return go


def test_without_docker_one_line_says_what_to_do(run: Run, tmp_path: Path) -> None:
    done = run("up", docker="")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "docker is not installed" in done.stderr
    assert not (tmp_path / "env").exists()


def test_without_an_engine_one_line_says_what_to_do(run: Run) -> None:
    done = run("up", ENGINE="1")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no Docker engine answers" in done.stderr


def test_up_builds_starts_waits_and_prints_a_line_to_paste(run: Run, tmp_path: Path) -> None:
    done = run("up")
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text()
    steps = [asked.index(step) for step in ("build", "up -d", "exec -T router", "port router 8000")]
    assert steps == sorted(steps)
    assert "a-model answers at http://127.0.0.1:8000/v1" in done.stdout
    assert "curl http://127.0.0.1:8000/v1/chat/completions" in done.stdout


def test_the_settings_get_new_passwords_that_nobody_else_may_read(run: Run, tmp_path: Path) -> None:
    run("up")
    env = tmp_path / "env"
    told = dict(line.split("=", 1) for line in env.read_text().splitlines() if "=" in line and line[0] != "#")
    passwords = [value for key, value in told.items() if key.endswith("_PASSWORD")]
    assert len(passwords) == len(set(passwords)) == 5
    assert all(len(password) == 40 and password.isalnum() for password in passwords)
    assert int(told["THREADS"]) >= 1
    assert stat.S_IMODE(env.stat().st_mode) == 0o600


def test_settings_that_are_there_are_kept(run: Run, tmp_path: Path) -> None:
    env = tmp_path / "env"
    env.write_text("PORT=8123\n")
    assert run("up").returncode == 0
    assert env.read_text() == "PORT=8123\n"


def test_a_stack_that_never_becomes_ready_is_given_up_with_a_line_that_says_where_to_look(run: Run) -> None:
    done = run("up", READY="1", READY_S="1")
    assert done.returncode == 1
    assert "not ready after 1 s; see: compose/stack.sh compose logs router prefill decode" in done.stderr


def test_down_removes_the_data_only_when_told(run: Run, tmp_path: Path) -> None:
    assert "nothing was started" in run("down").stderr
    (tmp_path / "env").write_text("")
    run("down")
    assert "--volumes" not in (tmp_path / "asked").read_text()
    run("down", VOLUMES="1")
    assert "down --remove-orphans --volumes" in (tmp_path / "asked").read_text()


def test_settings_of_a_user_are_no_part_of_the_repository() -> None:
    ignored = subprocess.run(
        ["git", "-C", str(ROOT), "check-ignore", ".env", ".env.second"], capture_output=True, text=True, check=False
    )
    if ignored.returncode == 128:
        pytest.skip("not a git checkout")
    assert ignored.stdout.split() == [".env", ".env.second"]
    assert os.access(ROOT / ".env.example", os.R_OK)
