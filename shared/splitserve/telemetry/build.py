"""What is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """Of splitserve; "unknown" when it runs from a folder that was never installed."""
    try:
        return version("splitserve")
    except PackageNotFoundError:
        return "unknown"
