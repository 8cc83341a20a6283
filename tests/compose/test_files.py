"""What docker-compose.yml promises, read off the file: no engine is needed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from support.processes import ROOT

FILES = ("docker-compose.yml", "docker-compose.federation.yml", "docker-compose.gpu.yml")
OURS = ("model", "router", "prefill", "decode")
_VARIABLE = re.compile(r"\$\{(\w+)(:-[^}]*|:\?[^}]*)?\}")


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return read("docker-compose.yml")["services"]


@pytest.mark.parametrize("name", FILES)
def test_every_setting_that_a_file_reads_is_told_of_with_the_default_it_has(name: str) -> None:
    told = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    read_here = _VARIABLE.findall((ROOT / name).read_text())
    assert read_here
    for variable, default in read_here:
        assert variable in told, f"{variable} is not in .env.example"
        if default.startswith(":-") and told[variable] and variable != "SPLITSERVE_IMAGE":
            assert told[variable] == default[2:], f"{variable} has another default in {name} than in .env.example"


def test_a_password_that_is_missing_stops_compose_instead_of_being_empty() -> None:
    uses = [found for name in FILES for found in _VARIABLE.findall((ROOT / name).read_text()) if "PASSWORD" in found[0]]
    demanded = {variable for variable, default in uses if default.startswith(":?")}
    assert demanded == {variable for variable, _ in uses}
    assert all(not default or default.startswith(":?") for _, default in uses)


def test_only_the_router_prometheus_and_grafana_publish_a_port_and_on_loopback_by_default(
    services: dict[str, Any],
) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert set(published) == {"router", "prometheus", "prometheus-federation", "grafana"}
    assert all(port.startswith("${PUBLISH:-127.0.0.1}:") for ports in published.values() for port in ports)


def test_workers_are_on_inner_networks_alone_and_redis_is_the_routers(services: dict[str, Any]) -> None:
    networks = read("docker-compose.yml")["networks"]
    inner = {name for name, options in networks.items() if options.get("internal")}
    for name in ("prefill", "decode", "nats", "redis"):
        assert set(services[name]["networks"]) <= inner
    assert {name for name, service in services.items() if "store" in service["networks"]} == {"redis", "router"}


def test_our_services_run_one_image_with_no_privileges_and_signals_reach_them(services: dict[str, Any]) -> None:
    for name in OURS:
        service = services[name]
        assert service["image"] == "${SPLITSERVE_IMAGE:-splitserve:latest}"
        assert service["cap_drop"] == ["ALL"]
        assert service["init"] is True
    assert [name for name, service in services.items() if "build" in service] == ["model"]


def test_the_engine_gives_a_worker_longer_than_it_takes_to_drain(services: dict[str, Any]) -> None:
    for name in ("router", "prefill", "decode"):
        grace = re.fullmatch(r"\$\{STOP_GRACE_PERIOD:-(\d+)s\}", services[name]["stop_grace_period"])
        drain = re.fullmatch(r"\$\{DRAIN_TIMEOUT:-(\d+)\}", services[name]["environment"]["SPLITSERVE_DRAIN_TIMEOUT"])
        assert grace
        assert drain
        assert int(grace[1]) >= int(drain[1]) + 10


def test_nothing_starts_before_what_it_needs(services: dict[str, Any]) -> None:
    for name in ("router", "prefill", "decode"):
        needs = {needed: how["condition"] for needed, how in services[name]["depends_on"].items()}
        assert needs["model"] == "service_completed_successfully"
        assert needs["nats"] == "service_healthy"
    assert services["router"]["depends_on"]["redis"]["condition"] == "service_healthy"


def test_prometheus_scrapes_each_phase_by_name_and_the_router_by_its_own_series() -> None:
    jobs = {job["job_name"]: job for job in read("compose/prometheus/prometheus.yml")["scrape_configs"]}
    for phase in ("router", "prefill", "decode"):
        [found] = jobs[phase]["dns_sd_configs"]
        assert (found["names"], found["type"], found["port"]) == ([phase], "A", 9400)
    assert jobs["router"]["metrics_path"] == "/metrics/router"


def test_federation_keeps_the_labels_of_each_stack() -> None:
    [job] = read("compose/prometheus/federation.yml")["scrape_configs"]
    assert job["honor_labels"] is True
    assert job["metrics_path"] == "/federate"
    aliases = read("docker-compose.yml")["services"]["prometheus"]["networks"]["federation"]["aliases"]
    assert job["dns_sd_configs"][0]["names"] == aliases
    assert read("compose/prometheus/prometheus.yml")["global"]["external_labels"] == {"stack": "${STACK}"}


def test_each_phase_has_a_gpu_of_its_own_in_the_gpu_file() -> None:
    services = read("docker-compose.gpu.yml")["services"]
    devices = {
        phase: services[phase]["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
        for phase in ("prefill", "decode")
    }
    assert devices == {"prefill": ["${PREFILL_GPU:-0}"], "decode": ["${DECODE_GPU:-1}"]}
    assert services["model"]["build"]["args"]["TORCH_PIP_ARGS"] == ""
