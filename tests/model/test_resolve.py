from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from splitserve.config import ModelSettings
from splitserve.errors import ModelUnavailable
from splitserve.model.resolve import resolve, served_names
from support.hub import SHA, Hub, running_hub
from support.processes import environment

MODEL = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "generation_config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"the same again",
    "onnx/model.onnx": b"and again",
    "README.md": b"words",
}


@pytest.fixture
def hub() -> Generator[Hub, None, None]:
    with running_hub() as running:
        running.files["ada/tiny"] = dict(MODEL)
        yield running


def resolved(home: Path, model: str, *, endpoint: str, **env: str) -> subprocess.CompletedProcess[str]:
    """What `splitserve serve` runs to find its model."""
    told = {"SPLITSERVE_MODEL": model, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", **env}
    command = [sys.executable, "-m", "splitserve.model.resolve"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment(**told))


def fails(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 5
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


def folder_of(done: subprocess.CompletedProcess[str]) -> Path:
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1].removeprefix("folder "))


def test_only_the_needed_files_of_a_hub_model_are_downloaded_and_kept(hub: Hub, tmp_path: Path) -> None:
    done = resolved(tmp_path, "ada/tiny", endpoint=hub.url)
    assert "progress downloading ada/tiny" in done.stdout
    files = sorted(path.name for path in folder_of(done).iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    hub.downloaded.clear()
    again = resolved(tmp_path, "ada/tiny", endpoint=hub.url)
    assert folder_of(again) == folder_of(done)
    assert hub.downloaded == []
    assert "downloading" not in again.stdout


def test_the_hubs_token_revision_and_offline_environment_are_respected(hub: Hub, tmp_path: Path) -> None:
    fails(
        resolved(tmp_path, "ada/tiny", endpoint=hub.url, HF_HUB_OFFLINE="1"),
        "ada/tiny is not in the cache",
        "HF_HUB_OFFLINE",
    )
    assert hub.tokens == []
    done = resolved(tmp_path, "ada/tiny", endpoint=hub.url, HF_TOKEN="hf_secret", SPLITSERVE_REVISION=SHA)
    assert folder_of(done).name == SHA
    assert set(hub.tokens) == {"Bearer hf_secret"}
    offline = resolved(tmp_path, "ada/tiny", endpoint=hub.url, HF_HUB_OFFLINE="1", SPLITSERVE_REVISION=SHA)
    assert folder_of(offline) == folder_of(done)


def test_a_model_that_is_cached_serves_when_the_hub_is_away(hub: Hub, tmp_path: Path) -> None:
    folder = folder_of(resolved(tmp_path, "ada/tiny", endpoint=hub.url))
    done = resolved(tmp_path, "ada/tiny", endpoint="http://127.0.0.1:9")
    assert folder_of(done) == folder
    assert "cannot be reached" in done.stdout


def test_no_network_is_one_line_and_quick(tmp_path: Path) -> None:
    began = time.monotonic()
    fails(resolved(tmp_path, "ada/tiny", endpoint="http://127.0.0.1:9"), "cannot get ada/tiny", "network")
    assert time.monotonic() - began < 60


def test_a_model_that_the_hub_does_not_know_is_one_line(hub: Hub, tmp_path: Path) -> None:
    fails(resolved(tmp_path, "ada/typo", endpoint=hub.url), "no hub model ada/typo", "HF_TOKEN")


def test_a_gated_model_is_one_line_with_what_to_do(hub: Hub, tmp_path: Path) -> None:
    hub.refusals["ada/gated"] = (403, "GatedRepo")
    fails(resolved(tmp_path, "ada/gated", endpoint=hub.url), "ada/gated is gated", "accept its terms", "HF_TOKEN")


def test_a_wrong_revision_is_one_line(hub: Hub, tmp_path: Path) -> None:
    fails(resolved(tmp_path, "ada/tiny", endpoint=hub.url, SPLITSERVE_REVISION="v9"), "no revision 'v9'")


def test_no_room_is_one_line_with_both_numbers_before_anything_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.sizes["model.safetensors"] = 1 << 60
    fails(resolved(tmp_path, "ada/tiny", endpoint=hub.url), f"needs {1 << 40} MB", "MB are free", "HF_HOME")
    assert hub.downloaded == []


def test_a_hub_model_without_safetensors_is_one_line(hub: Hub, tmp_path: Path) -> None:
    del hub.files["ada/tiny"]["model.safetensors"]
    fails(resolved(tmp_path, "ada/tiny", endpoint=hub.url), "no *.safetensors")
    assert hub.downloaded == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def test_a_local_folder_is_taken_as_it_is(folder: Path) -> None:
    assert resolve(ModelSettings(model=str(folder))) == folder


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_that_lacks_a_part_is_refused_naming_it(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(ModelUnavailable, match=missing.removeprefix("model")):
        resolve(ModelSettings(model=str(folder)))


def test_a_router_needs_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert resolve(ModelSettings(model=str(folder)), weights=False) == folder


def test_weights_in_another_format_are_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelUnavailable, match=r"pytorch_model\.bin is not read"):
        resolve(ModelSettings(model=str(folder)))


def test_a_missing_shard_is_named(folder: Path) -> None:
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "model-1.safetensors").write_text("")
    with pytest.raises(ModelUnavailable, match=r"1 of 2 weight files, the first is model-2\.safetensors"):
        resolve(ModelSettings(model=str(folder)))


@pytest.mark.parametrize(("name", "says"), [("/no/such/folder", "no folder"), ("./nowhere", "no folder")])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name: str, says: str) -> None:
    with pytest.raises(ModelUnavailable, match=says):
        resolve(ModelSettings(model=name))


def test_a_file_is_no_model_folder(folder: Path) -> None:
    with pytest.raises(ModelUnavailable, match="is a file"):
        resolve(ModelSettings(model=str(folder / "config.json")))


def test_clients_use_the_given_names_else_the_models_own() -> None:
    assert served_names(ModelSettings(served_model_name="a, b,")) == ("a", "b")
    assert served_names(ModelSettings(model="ada/tiny")) == ("ada/tiny",)
    assert served_names(ModelSettings()) == ("SmolLM2-135M-Instruct",)
