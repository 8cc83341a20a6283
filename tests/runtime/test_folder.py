from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from splitserve.runtime.folder import run_folder

HOLDER = """
import sys, time
from pathlib import Path
from splitserve.runtime.folder import run_folder
with run_folder(Path(sys.argv[1])) as folder:
    print(folder, flush=True)
    time.sleep(600)
"""


def test_the_run_folder_is_private_and_goes_with_its_owner(tmp_path: Path) -> None:
    with run_folder(tmp_path) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "inside").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_the_next_start_removes_what_a_killed_one_left_and_spares_the_living(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        left = Path(other.stdout.readline().strip())
        with run_folder(tmp_path) as mine:
            assert left.is_dir()
            other.kill()
            other.wait()
            with run_folder(tmp_path):
                assert not left.exists()
                assert mine.is_dir()


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / f"splitserve-{os.getuid() + 1}-abc"
    foreign.mkdir()
    with run_folder(tmp_path):
        assert foreign.is_dir()
