from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from splitserve.cli import parse
from splitserve.config import ServeProcessSettings
from splitserve.serve.cores import CoreShare
from splitserve.serve.plan import Given, curl_line, front_cpus, is_open, join_line, router_spec, url_of, worker_specs
from splitserve.worker.lending import Lending

GIVEN = Given(
    folder=Path("/models/tiny"),
    served_name="ada/tiny",
    nats="@/run/nats",
    redis="@/run/redis",
    sockets=Path("/run/kv"),
    port=8000,
    pool_bytes=1 << 30,
    log_format="json",
)


def settings(*flags: str) -> ServeProcessSettings:
    return parse(["serve", *flags], {})[1]


def read_back(command: str, env: dict[str, str], monkeypatch: pytest.MonkeyPatch, *flags: str) -> Any:
    """The settings that a child started with `env` and `flags` has."""
    with monkeypatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        return parse([command, *flags], {})[1]


def test_each_worker_has_its_role_its_name_and_its_cores() -> None:
    specs = worker_specs(
        settings("--prefill", "2", "--decode", "1"), GIVEN, [CoreShare(1, (0,)), CoreShare(1, (1,)), CoreShare(2)]
    )
    assert [spec.name for spec in specs] == ["prefill-0", "prefill-1", "decode-0"]
    assert [spec.command[-3:] for spec in specs] == [
        ("prefill", "--name", "prefill-0"),
        ("prefill", "--name", "prefill-1"),
        ("decode", "--name", "decode-0"),
    ]
    assert [spec.cpus for spec in specs] == [(0,), (1,), ()]
    assert specs[2].env["SPLITSERVE_THREADS"] == specs[2].env["OMP_NUM_THREADS"] == "2"


def test_the_router_runs_beside_prefill_where_workers_are_pinned() -> None:
    shares = [CoreShare(2, (0, 1)), CoreShare(2, (2, 3))]
    assert front_cpus(settings(), shares) == (0, 1)
    assert router_spec(settings(), GIVEN, front_cpus(settings(), shares)).cpus == (0, 1)
    assert front_cpus(settings("--prefill", "0", "--decode", "2"), shares) == ()
    assert front_cpus(settings(), [CoreShare(1)] * 2) == ()


def test_pinned_workers_are_told_whose_cores_they_may_borrow(monkeypatch: pytest.MonkeyPatch) -> None:
    lent = replace(GIVEN, page=Path("/run/lending"))
    specs = worker_specs(settings(), lent, [CoreShare(1, (0,)), CoreShare(1, (1,))])
    told = [read_back("decode", dict(spec.env), monkeypatch).worker.lending for spec in specs]
    assert [Lending.parse(text) for text in told] == [Lending(Path("/run/lending"), n, 1, ((0,), (1,))) for n in (0, 1)]
    assert {spec.cpus for spec in specs} == {()}, "OpenMP must see all processors when it starts"


def test_workers_that_are_not_all_pinned_borrow_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lent = replace(GIVEN, page=Path("/run/lending"))
    for given, shares in ((GIVEN, [CoreShare(1, (0,)), CoreShare(1, (1,))]), (lent, [CoreShare(1)] * 2)):
        specs = worker_specs(settings(), given, shares)
        assert [read_back("decode", dict(spec.env), monkeypatch).worker.lending for spec in specs] == ["", ""]


def test_on_a_shared_bus_names_are_unique() -> None:
    (spec, _) = worker_specs(settings(), replace(GIVEN, suffix="box-17-"), [CoreShare(1)] * 2)
    assert spec.name == "prefill-box-17-0"


def test_children_read_back_what_serve_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = settings("--dtype", "float32", "--block-size", "32", "--no-enable-prefix-caching", "--kv-lease-ttl", "3")
    prefill, _ = worker_specs(told, GIVEN, [CoreShare(1)] * 2)
    child = read_back("prefill", dict(prefill.env), monkeypatch)
    assert child.engine == told.engine.model_copy(
        update={"threads": 1, "kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.45}
    )
    assert child.model == told.model.model_copy(update={"model": "/models/tiny", "served_model_name": "ada/tiny"})
    assert child.transfer == told.transfer.model_copy(update={"kv_socket_dir": "/run/kv"})
    assert (child.cluster.nats, child.cluster.redis) == ("@/run/nats", "@/run/redis")


def test_a_flag_at_its_default_wins_over_the_environment_that_children_inherit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLITSERVE_BLOCK_SIZE", "32")
    told = settings("--block-size", "16")
    _, decode = worker_specs(told, GIVEN, [CoreShare(1)] * 2)
    assert read_back("decode", dict(decode.env), monkeypatch).engine.block_size == 16


def test_without_prefill_workers_the_router_never_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = router_spec(settings("--prefill", "0", "--split", "always"), GIVEN)
    assert read_back("router", dict(spec.env), monkeypatch).routing.split == "never"
    spec = router_spec(settings("--split", "always"), GIVEN)
    assert read_back("router", dict(spec.env), monkeypatch).routing.split == "always"


def test_passwords_and_keys_are_in_no_command_line() -> None:
    told = settings("--api-key", "sesame")
    specs = [router_spec(told, GIVEN), *worker_specs(told, GIVEN, [CoreShare(1)] * 2)]
    assert not any("sesame" in word for spec in specs for word in spec.command)
    assert "SPLITSERVE_API_KEY" not in specs[1].env  # a worker has no use for it


@pytest.mark.parametrize(
    ("host", "url", "open_to_others"),
    [
        ("127.0.0.1", "http://localhost:8000", False),
        ("localhost", "http://localhost:8000", False),
        ("0.0.0.0", "http://localhost:8000", True),
        ("::", "http://localhost:8000", True),
        ("10.0.0.7", "http://10.0.0.7:8000", True),
        ("fe80::1", "http://[fe80::1]:8000", True),
    ],
)
def test_where_clients_find_it_and_whether_others_may(host: str, url: str, open_to_others: bool) -> None:
    assert url_of(host, 8000) == url
    assert is_open(host) is open_to_others


def test_the_line_to_paste_survives_a_shell() -> None:
    words = shlex.split(curl_line("http://localhost:8000", "ada's model", "a key"))
    assert words[:2] == ["curl", "http://localhost:8000/v1/chat/completions"]
    assert "Authorization: Bearer a key" in words
    assert '"model": "ada\'s model"' in words[-1]


def test_the_joining_line_repeats_what_must_be_equal() -> None:
    told = settings("--dtype", "float32", "--block-size", "32", "--port", "9000", "--cluster", "blue")
    words = shlex.split(join_line(told, GIVEN))
    assert words[:3] == ["splitserve", "decode", "--nats"]
    joined = parse(words[1:], {})[1]
    assert joined.model.model == "/models/tiny"
    assert (joined.model.dtype, joined.engine.block_size, joined.cluster.cluster) == ("float32", 32, "blue")
