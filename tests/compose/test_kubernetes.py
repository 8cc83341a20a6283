"""The Kubernetes manifests: whole, valid by the API's schemas, in tune with the settings, the image and the metrics."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from splitserve.config import GROUPS
from support.manifests import (
    KUBERNETES,
    KUSTOMIZATION,
    OVERLAYS,
    SCHEMAS,
    Object,
    build,
    objects_of,
    reached_from,
    validate,
)
from support.processes import ROOT
from support.promql import known_names, names_in

OURS = ("router", "prefill", "decode")
PHASES = ("prefill", "decode")
VERSIONS = ("1.27", "1.32", "1.36")
SETTINGS = {f"SPLITSERVE_{name.upper()}" for group in GROUPS for name in group.model_fields}


@pytest.fixture(scope="module")
def every_object() -> list[Object]:
    """All objects of all files, as written."""
    paths = {path for overlay in OVERLAYS for path in reached_from(KUBERNETES / "overlays" / overlay)[1]}
    return [found for path in sorted(paths) for found in objects_of(path.read_text())]


def _named(objects: list[Object], kind: str) -> dict[str, Object]:
    return {found["metadata"]["name"]: found for found in objects if found["kind"] == kind}


def _pods(objects: list[Object]) -> dict[str, Object]:
    return {name: found["spec"]["template"]["spec"] for name, found in _named(objects, "Deployment").items()}


def _settings() -> dict[str, str]:
    lines = (KUBERNETES / "base" / "settings.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


# --- whole and valid ---


def test_every_file_is_reached_from_an_overlay_and_every_path_leads_to_one() -> None:
    folders: set[Path] = set()
    files: set[Path] = set()
    for overlay in OVERLAYS:
        more_folders, more_files = reached_from(KUBERNETES / "overlays" / overlay)
        folders |= set(more_folders)
        files |= set(more_files)
    patches = {
        (folder / patch["path"]).resolve()
        for folder in folders
        for patch in yaml.safe_load((folder / KUSTOMIZATION).read_text()).get("patches", ())
    }
    aside = {KUBERNETES / "components" / "hpa" / "prometheus-adapter.yaml"}  # values of a Helm chart
    there = {path for path in KUBERNETES.rglob("*.yaml") if path.name != KUSTOMIZATION}
    assert there == {path for path in files | patches | aside if path.is_relative_to(KUBERNETES)}


def test_every_patch_and_image_has_something_to_change(every_object: list[Object]) -> None:
    images = {container["image"] for pod in _pods(every_object).values() for container in pod["containers"]}
    for overlay in OVERLAYS:
        told = yaml.safe_load((KUBERNETES / "overlays" / overlay / KUSTOMIZATION).read_text())
        assert {image["name"] for image in told["images"]} <= images
        for patch in told.get("patches", ()):
            wanted = patch["target"]
            deployments = _named(every_object, wanted["kind"])
            assert {name for name in deployments if re.fullmatch(wanted["name"], name)} == set(PHASES)


@pytest.mark.parametrize("version", VERSIONS)
def test_each_object_as_written_is_valid(every_object: list[Object], version: str) -> None:
    assert len(every_object) > 15
    for found in every_object:
        validate(found, version)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_object_as_built_is_valid_and_in_one_namespace(overlay: str) -> None:
    objects = build(overlay)
    for found in objects:
        validate(found, VERSIONS[-1])
        assert found["metadata"].get("namespace", "splitserve") == "splitserve"
    kinds = {found["kind"] for found in objects}
    assert ({"HorizontalPodAutoscaler", "ScaledObject"} & kinds) == {
        "HorizontalPodAutoscaler" if overlay == "cpu" else "ScaledObject"
    }


def test_the_gpu_overlay_gives_each_worker_a_gpu_and_the_router_none() -> None:
    pods = _pods(build("gpu"))
    for name in OURS:
        [container] = pods[name]["containers"]
        assert container["resources"]["limits"].get("nvidia.com/gpu") == ("1" if name in PHASES else None)
    told = {
        key: value for found in build("gpu") if found["kind"] == "ConfigMap" for key, value in found["data"].items()
    }
    assert told["SPLITSERVE_DEVICE"] == "cuda"
    assert told["SPLITSERVE_KV_TRANSPORT"] == "tcp", "what the base says stays"


@pytest.mark.parametrize("kind", ["Deployment", "ScaledObject", "PodMonitor"])
def test_a_field_that_does_not_exist_is_found(every_object: list[Object], kind: str) -> None:
    wrong = copy.deepcopy(next(found for found in every_object if found["kind"] == kind))
    wrong["spec"]["replicaz"] = 1
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(wrong, VERSIONS[-1])


def test_each_schema_of_our_own_is_used(every_object: list[Object]) -> None:
    assert {path.stem for path in SCHEMAS.glob("*.json")} <= {found["kind"].lower() for found in every_object}


# --- pods ---


def test_pods_run_as_nobody_with_a_read_only_root_and_no_privileges(every_object: list[Object]) -> None:
    for name, pod in _pods(every_object).items():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True, name
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert {"requests", "limits"} <= set(container["resources"])


def test_our_pods_run_as_the_user_of_the_image_and_may_write_where_it_writes(every_object: list[Object]) -> None:
    dockerfile = (ROOT / "compose" / "Dockerfile").read_text()
    [user] = re.findall(r"useradd .*--uid (\d+)", dockerfile)
    [cache] = re.findall(r"SPLITSERVE_CACHE_DIR=(\S+)", dockerfile)
    for name in OURS:
        pod = _pods(every_object)[name]
        assert pod["securityContext"]["runAsUser"] == int(user)
        mounts = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert {cache, "/tmp"} <= mounts


def test_a_pod_is_asked_on_the_port_that_the_image_opens_and_has_time_to_drain(every_object: list[Object]) -> None:
    [metrics] = re.findall(r"SPLITSERVE_METRICS_PORT=(\d+)", (ROOT / "compose" / "Dockerfile").read_text())
    drain = int(_settings()["SPLITSERVE_DRAIN_TIMEOUT"])
    for name in OURS:
        pod = _pods(every_object)[name]
        [container] = pod["containers"]
        assert {"name": "metrics", "containerPort": int(metrics)} in container["ports"]
        asked = {probe: container[probe]["httpGet"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
        assert {probe["port"] for probe in asked.values()} == {"metrics"}
        assert [probe["path"] for probe in asked.values()] == ["/health", "/ready", "/health"]
        before = int(container["lifecycle"]["preStop"]["exec"]["command"][1]) if "lifecycle" in container else 0
        assert pod["terminationGracePeriodSeconds"] >= before + drain + 10


def test_a_service_never_becomes_a_setting(every_object: list[Object]) -> None:
    """Kubernetes would put the address of a Service `splitserve` into SPLITSERVE_PORT."""
    assert all(pod["enableServiceLinks"] is False for pod in _pods(every_object).values())


def test_secrets_are_asked_for_by_key_and_none_is_written_down(every_object: list[Object]) -> None:
    keys: set[str] = set()
    for pod in _pods(every_object).values():
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            for variable in container.get("env", ()):
                if "valueFrom" in variable:
                    wanted = variable["valueFrom"]["secretKeyRef"]
                    assert wanted["name"] == "splitserve-passwords"
                    keys.add(wanted["key"])
    assert not _named(every_object, "Secret")
    command = (ROOT / "docs" / "deploy.md").read_text()
    assert keys - {"hf-token"} == set(re.findall(r"--from-literal=([a-z-]+)=", command))


# --- in tune with the rest ---


def test_every_variable_of_the_manifests_and_the_compose_files_is_a_setting(every_object: list[Object]) -> None:
    text = "".join(path.read_text() for path in KUBERNETES.rglob("*") if path.is_file())
    text += "".join(path.read_text() for path in ROOT.glob("docker-compose*.yml"))
    text += (ROOT / "compose" / "Dockerfile").read_text()
    assert set(_settings()) <= SETTINGS
    assert set(re.findall(r"SPLITSERVE_[A-Z_]+", text)) <= SETTINGS | {"SPLITSERVE_IMAGE"}


def test_selectors_find_pods_and_services_find_ports(every_object: list[Object]) -> None:
    pods = _pods(every_object)
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
        for name, found in _named(every_object, kind).items():
            spec = found["spec"]
            selector = spec.get("podSelector", spec.get("selector"))
            labels: dict[str, Any] = selector.get("matchLabels", selector)
            assert labels["app.kubernetes.io/component"] in pods
            if kind == "Service":
                open_ports = {port["name"] for port in pods[name]["containers"][0]["ports"]}
                assert {port["targetPort"] for port in spec["ports"]} <= open_ports
    assert set(_named(every_object, "PodDisruptionBudget")) == set(OURS)


def test_prometheus_scrapes_routers_by_their_own_series_and_workers_by_theirs(every_object: list[Object]) -> None:
    monitors = _named(every_object, "PodMonitor")
    paths = {name: found["spec"]["podMetricsEndpoints"][0]["path"] for name, found in monitors.items()}
    assert paths == {"router": "/metrics/router", "workers": "/metrics"}
    assert {found["spec"]["jobLabel"] for found in monitors.values()} == {"app.kubernetes.io/component"}


def test_each_phase_has_an_autoscaler_of_each_sort_with_metrics_that_exist(every_object: list[Object]) -> None:
    adapter = yaml.safe_load((KUBERNETES / "components/hpa/prometheus-adapter.yaml").read_text())["rules"]["custom"]
    made = {rule["name"]["as"] for rule in adapter}
    used: set[str] = set()
    for scaler in _named(every_object, "HorizontalPodAutoscaler").values():
        assert scaler["spec"]["scaleTargetRef"]["name"] == scaler["metadata"]["name"]
        used |= {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]}
    assert used == made
    assert (
        set(_named(every_object, "HorizontalPodAutoscaler")) == set(_named(every_object, "ScaledObject")) == set(PHASES)
    )
    assert {name for rule in adapter for name in names_in(rule["seriesQuery"])} <= known_names()
    for scaler in _named(every_object, "ScaledObject").values():
        for trigger in scaler["spec"]["triggers"]:
            query = trigger["metadata"]["query"]
            assert names_in(query) <= known_names()
            assert f'job="{scaler["spec"]["scaleTargetRef"]["name"]}"' in query


def test_prometheus_reads_the_autoscalers_queries(every_object: list[Object], tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    adapter = yaml.safe_load((KUBERNETES / "components/hpa/prometheus-adapter.yaml").read_text())["rules"]["custom"]
    filled = {"<<.GroupBy>>": "pod", "<<.LabelMatchers>>": 'namespace="splitserve"'}
    queries = [
        t["metadata"]["query"] for s in _named(every_object, "ScaledObject").values() for t in s["spec"]["triggers"]
    ]
    for rule in adapter:
        [series] = names_in(rule["seriesQuery"])
        query = rule["metricsQuery"].replace("<<.Series>>", series)
        for mark, text in filled.items():
            query = query.replace(mark, text)
        queries.append(query)
    rules = [{"record": f"query:{number}:value", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True, timeout=30, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_nats_says_the_same_in_compose_and_here(every_object: list[Object]) -> None:
    config = (ROOT / "compose" / "nats" / "nats.conf").read_text()
    [container] = _pods(every_object)["nats"]["containers"]
    assert set(re.findall(r"\$(NATS_\w+)", config)) <= {variable["name"] for variable in container["env"]}
    assert "../../nats" in yaml.safe_load((KUBERNETES / "base" / KUSTOMIZATION).read_text())["resources"]
