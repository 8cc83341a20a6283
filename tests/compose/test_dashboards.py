"""The Grafana dashboards: made from their tables, of series that exist, and each query answered by a real Prometheus."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from support.client_log import Client
from support.cluster import running
from support.processes import ROOT
from support.prometheus import Answer, Prometheus, scraping
from support.promql import known_names, names_in

GRAFANA = ROOT / "compose" / "grafana"
MADE = sorted((GRAFANA / "dashboards").glob("*.json"))
OF_VLLMS_DASHBOARDS = {
    *("vllm:e2e_request_latency_seconds_bucket", "vllm:time_to_first_token_seconds_bucket"),
    *("vllm:inter_token_latency_seconds_bucket", "vllm:request_time_per_output_token_seconds_bucket"),
    *("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total"),
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    *("vllm:request_prompt_tokens_bucket", "vllm:request_generation_tokens_bucket"),
    *("vllm:request_queue_time_seconds_sum", "vllm:request_prefill_time_seconds_sum"),
    *("vllm:request_decode_time_seconds_sum", "vllm:request_max_num_generation_tokens_sum"),
}


def _panels(path: Path) -> list[dict[str, Any]]:
    return [panel for panel in json.loads(path.read_text())["panels"] if panel["type"] != "row"]


def _queries(path: Path) -> list[str]:
    return [target["expr"] for panel in _panels(path) for target in panel["targets"]]


def _plain(query: str) -> str:
    """The query with what Grafana would put for its variables."""
    return query.replace("$model", ".*").replace("$__rate_interval", "30s")


def test_the_dashboards_are_what_their_tables_make(tmp_path: Path) -> None:
    subprocess.run([sys.executable, GRAFANA / "make_dashboards.py", tmp_path], check=True, timeout=60)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_text() for path in MADE}, "run compose/grafana/make_dashboards.py"
    assert len(made) == 3


@pytest.mark.parametrize("path", MADE, ids=lambda path: path.stem)
def test_panels_ask_only_for_series_that_are_exported_or_recorded(path: Path) -> None:
    assert {name for query in _queries(path) for name in names_in(query)} <= known_names()


def test_what_vllms_own_dashboards_ask_is_asked() -> None:
    asked = {name for path in MADE if path.stem.startswith("vllm") for q in _queries(path) for name in names_in(q)}
    assert asked >= OF_VLLMS_DASHBOARDS


@pytest.mark.parametrize("path", MADE, ids=lambda path: path.stem)
def test_panels_have_a_unit_the_chosen_source_and_a_place_of_their_own(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in _panels(path):
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["fieldConfig"]["defaults"]["unit"]
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_provisioning_names_the_services_and_folders_of_the_compose_file() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    sources = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    services = {urlsplit(source["url"]).hostname for source in sources}
    assert services <= set(compose["services"])
    assert {source["uid"] for source in sources} == {"prometheus", "prometheus-federation"}
    [provider] = yaml.safe_load((GRAFANA / "provisioning/dashboards/splitserve.yml").read_text())["providers"]
    mounts = [volume.split(":")[:2] for volume in compose["services"]["grafana"]["volumes"]]
    assert ["./compose/grafana/dashboards", provider["options"]["path"]] in mounts
    assert ["./compose/grafana/provisioning", "/etc/grafana/provisioning"] in mounts


async def _used(url: str, model: str, prometheus: Prometheus) -> None:
    """Requests of several shapes, between scrapes: series that were there before are seen to rise."""
    await prometheus.until_all("vllm:generation_tokens_total >= 0", 1)
    client = Client(url, model, "none")
    prompt = "The quick brown fox jumps over the lazy dog and tells the other animals of it. " * 8
    for _ in range(3):
        await asyncio.gather(client.stream(prompt, 24), client.whole(prompt, 8, n=2), client.stream("Once", 12))
    await client.api.close()
    await prometheus.until_all("splitserve:goodput_requests:rate5m", 1)
    await prometheus.until_all("rate(vllm:generation_tokens_total[30s]) > 0", 1)


@pytest.mark.model
@pytest.mark.e2e
async def test_every_panels_query_is_answered_with_data_by_a_prometheus_over_a_cluster(
    smollm2_folder: Path, tmp_path: Path
) -> None:
    flags = ("--split", "always", "--kv-cache-memory-bytes", "256MiB")
    queries = {_plain(query) for path in MADE for query in _queries(path)}
    with running(tmp_path, *flags, model=smollm2_folder) as cluster:
        pages = {"router": ("/metrics/router", [urlsplit(cluster.url).netloc])}
        for name, beat in (await cluster.workers()).items():
            if beat.role != "router":
                pages[name.split("-")[0]] = ("/metrics", [urlsplit(beat.metrics_url).netloc])
        assert set(pages) == {"router", "prefill", "decode"}
        with scraping(tmp_path, pages) as prometheus:
            await _used(cluster.url, cluster.model, prometheus)
            answers = [await prometheus.ask(query) for query in sorted(queries)]
            rules = await prometheus.ask('count(ALERTS{alertstate="firing"}) or vector(0)')
    assert len(answers) > 80
    assert not [answer for answer in answers if answer.problem]
    assert not [answer.query for answer in answers if not answer.values]
    assert rules.values == (0.0,), "an alert fires over a cluster that is well"
    _stages_add_up(answers)


def _stages_add_up(answers: list[Answer]) -> None:
    """The heights of the stacked stages are the mean time to first token."""
    [stages] = [a for a in answers if "tokenise" in a.query]
    [whole] = [a for a in answers if re.fullmatch(r"sum\(rate\(vllm:time_to_first_token_seconds_sum.*", a.query)]
    assert sum(stages.values) == pytest.approx(whole.values[0], rel=0.05)
