"""The Kubernetes manifests as files and as kustomize builds them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from support.processes import ROOT

KUBERNETES = ROOT / "compose" / "kubernetes"
OVERLAYS = ("cpu", "gpu")
SCHEMAS = ROOT / "tests" / "compose" / "schemas"
KUSTOMIZATION = "kustomization.yaml"
Object = dict[str, Any]


def objects_of(text: str) -> list[Object]:
    return [found for found in yaml.safe_load_all(text) if found]


def build(overlay: str) -> list[Object]:
    """What `kubectl kustomize` makes of an overlay. Skips where neither kubectl nor kustomize is installed."""
    path = str(KUBERNETES / "overlays" / overlay)
    for command in (("kustomize", "build"), ("kubectl", "kustomize")):
        if shutil.which(command[0]):
            done = subprocess.run([*command, path], capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, done.stderr
            return objects_of(done.stdout)
    pytest.skip("neither kustomize nor kubectl is installed: the overlays are checked file by file alone")


def reached_from(folder: Path) -> tuple[list[Path], list[Path]]:
    """Kustomization folders and resource files that an overlay reaches. AssertionError for a path that leads nowhere."""
    told = yaml.safe_load((folder / KUSTOMIZATION).read_text())
    folders, files = [folder], []
    for name in (*told.get("resources", ()), *told.get("components", ())):
        path = (folder / name).resolve()
        assert path.exists(), f"{folder / KUSTOMIZATION} names {name}, which is not there"
        if path.is_file():
            files.append(path)
        else:
            more_folders, more_files = reached_from(path)
            folders += more_folders
            files += more_files
    return folders, files


def validate(found: Object, version: str) -> None:
    """Against Kubernetes' own schema of `version`, unknown fields refused, or the schema of an operator's object."""
    own = SCHEMAS / f"{found['kind'].lower()}.json"
    if own.exists():
        jsonschema.validate(found, json.loads(own.read_text()))
    else:
        kubernetes_validate.validate(found, version, strict=True)
