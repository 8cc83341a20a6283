"""What a PromQL expression asks for, and the names that the project exports."""

from __future__ import annotations

import re
from typing import Any

import yaml

from splitserve.telemetry.families import families
from splitserve.telemetry.family import Kind
from support.processes import ROOT

RULES = ROOT / "compose" / "prometheus" / "rules"
PROMETHEUS_OWN = frozenset({"up", "ALERTS"})
_NOT_NAMES = (r'"[^"]*"|\'[^\']*\'', r"\{[^}]*\}", r"\[[^]]*\]", r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")  # fmt: skip
_WORDS = frozenset({"and", "or", "unless", "bool", "offset", "inf", "nan"})
_SUFFIXES = {
    Kind.COUNTER: ("_total",),
    Kind.GAUGE: ("",),
    Kind.HISTOGRAM: ("_bucket", "_sum", "_count"),
    Kind.SUMMARY: ("_sum", "_count"),
}


def names_in(expression: str) -> set[str]:
    """The series that an expression selects: what is left without strings, labels, ranges, groupings and functions."""
    for pattern in _NOT_NAMES:
        expression = re.sub(pattern, " ", expression)
    found = re.findall(r"(?<![\w:$.])[a-zA-Z_:][\w:]*(?!\s*\(|[\w:])", expression)
    return {name for name in found if name.lower() not in _WORDS}


def rules(file: str) -> list[dict[str, Any]]:
    """The rules of one file of compose/prometheus/rules."""
    return [rule for group in yaml.safe_load((RULES / file).read_text())["groups"] for rule in group["rules"]]


def known_names() -> set[str]:
    """Every name that a query may use: samples of the table of families, recorded names, and Prometheus' own."""
    exported = {f"{family.name}{suffix}" for family in families(2048) for suffix in _SUFFIXES[family.kind]}
    return exported | {rule["record"] for rule in rules("recording.yml")} | PROMETHEUS_OWN
