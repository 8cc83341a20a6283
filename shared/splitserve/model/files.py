"""A model folder's small JSON files."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import orjson

from splitserve.errors import ModelUnavailable

Json = dict[str, object]


def read_json(path: Path, *, required: bool = False) -> Json:
    """The object in `path`; {} when there is no such file and it is not `required`. Raises ModelUnavailable."""
    try:
        data = orjson.loads(path.read_bytes())
    except FileNotFoundError as error:
        if required:
            raise ModelUnavailable(f"{path.parent} has no {path.name}: give a whole Hugging Face folder") from error
        return {}
    except (OSError, orjson.JSONDecodeError) as error:
        raise ModelUnavailable(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ModelUnavailable(f"{path} holds no JSON object")
    return cast(Json, data)


def read_text(path: Path) -> str | None:
    """The text of `path`, None when there is no such file. Raises ModelUnavailable."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelUnavailable(f"{path} cannot be read: {error}") from error
