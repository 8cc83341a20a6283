"""The recording rules and alerts: promtool runs their unit tests, and each name, objective and runbook line leads somewhere."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from splitserve.config import GROUPS
from splitserve.telemetry.families import families
from support.processes import ROOT
from support.promql import RULES, known_names, names_in, rules

FILES = ("recording.yml", "alerts.yml")


def _promtool(*arguments: str) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_rules() -> None:
    _promtool("check", "rules", *(str(RULES / file) for file in FILES))


def test_the_rules_answer_as_their_unit_tests_say() -> None:
    _promtool("test", "rules", *(str(path) for path in sorted((RULES / "tests").glob("*.yml"))))


def test_each_alert_fires_in_a_unit_test() -> None:
    text = "".join(path.read_text() for path in (RULES / "tests").glob("*.yml"))
    fired = set(re.findall(r"alertname: (\w+)\n\s+exp_alerts:\n\s+- exp_labels", text))
    assert {rule["alert"] for rule in rules("alerts.yml")} == fired


@pytest.mark.parametrize("file", FILES)
def test_every_series_that_a_rule_asks_for_is_exported_or_recorded(file: str) -> None:
    asked = {name for rule in rules(file) for name in names_in(rule["expr"])}
    assert asked
    assert asked <= known_names()


def test_names_are_told_from_labels_functions_and_strings() -> None:
    expression = (
        'sum by (le, job) (rate(vllm:a_bucket{le="1.0", x=~"b|c"}[5m] offset 5m)) / on (engine) (up > 0) and d_e'
    )
    assert names_in(expression) == {"vllm:a_bucket", "up", "d_e"}


def test_recorded_names_have_a_level_a_metric_and_operations() -> None:
    names = [rule["record"] for rule in rules("recording.yml")]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"splitserve(_phase)?:[a-z0-9_]+:[a-z0-9_]+", name) for name in names)


def test_each_objective_is_a_bound_of_its_histogram() -> None:
    bounds = {family.name: family.buckets for family in families(2048)}
    text = (RULES / "recording.yml").read_text()
    objectives = re.findall(r'([\w:]+)_bucket\{le="([\d.]+)"\}', text)
    assert len(objectives) == 2
    for name, bound in objectives:
        assert float(bound) in bounds[name]
        assert bound == str(float(bound)), "written as prometheus_client writes it"


def test_each_alert_has_a_severity_a_summary_and_a_section_in_the_runbook() -> None:
    sections = re.split(r"^## ", (ROOT / "docs" / "runbook.md").read_text(), flags=re.MULTILINE)[1:]
    written = {section.splitlines()[0]: section for section in sections}
    alerts = rules("alerts.yml")
    assert [rule["alert"] for rule in alerts] == list(written)
    for rule in alerts:
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert all(f"**{part}**" in written[rule["alert"]] for part in ("Means", "Look at", "Do"))


def test_the_runbook_names_only_series_and_flags_that_exist() -> None:
    text = (ROOT / "docs" / "runbook.md").read_text()
    flags = {f"--{name.replace('_', '-')}" for group in GROUPS for name in group.model_fields}
    assert set(re.findall(r"--[a-z][a-z-]+", text)) <= flags
    series = set(re.findall(r"(?:vllm:|splitserve[_:])[\w:]+", text))
    assert series <= known_names() | {family.name for family in families(2048)}
