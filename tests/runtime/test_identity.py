from __future__ import annotations

import socket

import pytest

from splitserve.config import WorkerSettings
from splitserve.errors import ConfigError
from splitserve.runtime.identity import found_at, name_of, url_of

NATS = "nats://user:password@127.0.0.1:4222"


def test_a_name_without_a_wish_tells_processes_of_one_machine_apart() -> None:
    role, _, pid = name_of("", "decode").rpartition("-")
    assert role.startswith("decode-")
    assert pid.isdigit()


def test_hostname_in_a_name_stands_for_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node.7")
    assert name_of("prefill-{hostname}", "prefill") == "prefill-node-7"


def test_a_name_with_a_blank_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be used on the bus"):
        name_of("my worker", "prefill")


def test_others_are_told_the_address_listened_on() -> None:
    assert found_at("10.0.0.7", WorkerSettings(), NATS) == "10.0.0.7"


@pytest.mark.parametrize("everywhere", ["0.0.0.0", "::", ""])
def test_who_listens_everywhere_is_found_where_it_meets_nats(everywhere: str) -> None:
    assert found_at(everywhere, WorkerSettings(), NATS) == "127.0.0.1"


def test_an_advertised_host_wins_over_both() -> None:
    assert found_at("0.0.0.0", WorkerSettings(advertise_host="prefill.example"), NATS) == "prefill.example"


def test_a_nats_that_has_no_address_is_named_in_the_refusal() -> None:
    with pytest.raises(ConfigError, match=r"no way to nats\.invalid .*--advertise-host"):
        found_at("0.0.0.0", WorkerSettings(), "nats://nats.invalid:4222")


def test_an_ipv6_address_stands_in_brackets() -> None:
    assert url_of("::1", 9400, "/metrics") == "http://[::1]:9400/metrics"
    assert url_of("10.0.0.7", 9400, "/metrics") == "http://10.0.0.7:9400/metrics"
