"""Prometheus's own judge of a metrics page (Debian package `prometheus`)."""

from __future__ import annotations

import shutil
import subprocess

import pytest

# vLLM's names, which are kept as they are
_KNOWN = (
    "metric names should not contain ':'",
    'vllm:iteration_tokens_total non-counter metrics should not have "_total" suffix',
)


def complaints(page: bytes) -> list[str]:
    """What `promtool check metrics` says of a page in text format, less what it says of vLLM's names. Skips without it."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, timeout=30, check=False)
    lines = (done.stdout + done.stderr).decode().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.rstrip().endswith(_KNOWN)]
