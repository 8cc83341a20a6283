from __future__ import annotations

import subprocess
import sys
import time

import pytest

from splitserve.cli import COMMANDS, parse
from splitserve.config import GROUPS
from splitserve.errors import ConfigError


def splitserve(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "splitserve", *arguments], capture_output=True, text=True, timeout=30)


def test_help_names_every_command_quickly_and_without_torch() -> None:
    began = time.monotonic()
    done = splitserve("--help")
    assert done.returncode == 0
    assert all(command.name in done.stdout for command in COMMANDS)
    assert time.monotonic() - began < 5  # half a second on an idle machine; torch alone takes longer than both
    loaded = "import sys; from splitserve.cli import parse; parse(['serve'], {}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded]).returncode == 0


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_each_commands_help_shows_flags_with_their_defaults(command: str) -> None:
    done = splitserve(command, "--help")
    assert done.returncode == 0
    choices, default = {"top": ("--api-key TEXT", "(default: 1.0)")}.get(
        command, ("--dtype {auto,float32,bfloat16,float16}", "(default: 60.0)")
    )
    assert choices in done.stdout
    assert default in done.stdout  # --interval, --drain-timeout


def test_version_is_printed() -> None:
    assert splitserve("--version").stdout.startswith("splitserve ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--prefil", "2"], "has no flag --prefil; did you mean --prefill?"),
        (["serve", "--prefill", "many"], "--prefill 'many'"),
        (["serve", "--max-num-seqs", "0"], "greater than or equal to 1"),
        (["serve", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["serve", "--kv-cache-memory-bytes", "2 lumps"], "is no size"),
        (["serve", "a/b", "c/d"], "one argument too many"),
        (["serve", "a/b", "--model", "c/d"], "two models: a/b and --model c/d"),
        (["router", "--decode", "2"], "splitserve router has no flag --decode"),
        (["bake"], "invalid choice: 'bake'"),
        ([], "COMMAND"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(arguments: list[str], says: str) -> None:
    done = splitserve(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_wrong_environment_variable_is_named() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPLITSERVE_MAX_NUM_SEQS", "zero")
        with pytest.raises(ConfigError, match="SPLITSERVE_MAX_NUM_SEQS 'zero'"):
            parse(["decode"], {"SPLITSERVE_MAX_NUM_SEQS": "zero"})


def test_a_flag_wins_over_the_environment_which_wins_over_the_default() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPLITSERVE_PREFILL", "3")
        patch.setenv("SPLITSERVE_DECODE", "4")
        _, settings = parse(["serve", "--prefill", "2"], {})
    assert (settings.serve.prefill, settings.serve.decode, settings.http.port) == (2, 4, 8000)


def test_the_model_is_taken_as_argument_or_as_flag() -> None:
    assert parse(["serve", "a/b"], {})[1].model.model == "a/b"
    assert parse(["serve", "--model", "a/b"], {})[1].model.model == "a/b"
    assert parse(["serve"], {})[1].model.model == ""


@pytest.mark.parametrize(
    ("text", "size"),
    [("1048576", 1 << 20), ("2GiB", 2 << 30), ("1.5g", 3 << 29), ("512 MiB", 512 << 20), ("2GB", 2 * 10**9)],
)
def test_sizes_are_read_with_units(text: str, size: int) -> None:
    _, settings = parse(["decode", "--kv-cache-memory-bytes", text], {})
    assert settings.engine.kv_cache_memory_bytes == size


def test_switches_can_be_turned_off() -> None:
    assert parse(["prefill", "--no-enable-prefix-caching"], {})[1].engine.enable_prefix_caching is False


def test_every_field_of_every_group_is_a_flag_of_some_command() -> None:
    shown = "".join(splitserve(command.name, "--help").stdout for command in COMMANDS)
    for group in GROUPS:
        for name in group.model_fields:
            assert f"--{name.replace('_', '-')}" in shown, name


def test_field_names_are_unique_over_all_groups() -> None:
    names = [name for group in GROUPS for name in group.model_fields]
    assert len(names) == len(set(names))
