"""Which KV is the same KV: a digest of all that makes a block's bytes mean what they mean. Nothing here loads torch.

Two workers may read each other's blocks only if their fingerprints are equal; a refusal names the factor that differs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from splitserve.kv.layout import KVLayout

KV_PROTOCOL = "1"  # of the block format and handle; raise it when either changes its meaning

Factors = tuple[tuple[str, str], ...]


def fingerprint_factors(
    *, model: str, weights: str, dtype: str, layout: KVLayout, rope: object, protocol: str = KV_PROTOCOL
) -> Factors:
    """Named factors in fixed order.

    `model` is the architecture, not the name it was asked by: one model has many. `weights` comes from `weights_digest`,
    `rope` is any JSON value that fixes the positions' encoding.
    """
    layout_text = " ".join(f"{name}={value}" for name, value in layout.factors().items())
    rope_text = hashlib.sha256(json.dumps(rope, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return (
        ("protocol", protocol),
        ("model", f"{model}@{weights[:16]}"),
        ("dtype", dtype),
        ("layout", layout_text),
        ("rope", rope_text),
    )


def fingerprint(factors: Factors) -> str:
    """sha256 (hex) over the factors."""
    return hashlib.sha256(json.dumps(factors).encode()).hexdigest()


def differing_factor(ours: Factors, theirs: Factors) -> str | None:
    """One line naming the first factor that differs, with both values; None when the two are equal."""
    other: Mapping[str, str] = dict(theirs)
    for name, value in ours:
        if other.get(name) != value:
            return f"{name}: here {value!r}, there {other.get(name, 'nothing')!r}"
    extra = [name for name, _ in theirs if name not in dict(ours)]
    return f"{extra[0]}: here nothing, there {other[extra[0]]!r}" if extra else None


def weights_digest(folder: Path) -> str:
    """sha256 (hex) that tells one set of weights from another without reading all of it.

    Over the config, the index if there is one, and of each safetensors file its name, size, header and a sample of its
    bytes: fine-tunes of equal shape differ in the sample. FileNotFoundError if the folder has no safetensors file.
    """
    digest = hashlib.sha256(_config_bytes(folder))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors file")
    index = folder / "model.safetensors.index.json"
    digest.update(index.read_bytes() if index.exists() else b"")
    for path in files:
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        with path.open("rb") as file:
            for piece in _sample(file, path.stat().st_size):
                digest.update(piece)
    return digest.hexdigest()


_SAMPLES = 64
_SAMPLE_BYTES = 4096
_VOLATILE = ("transformers_version", "_name_or_path")  # differ between two conversions of the same weights


def _config_bytes(folder: Path) -> bytes:
    path = folder / "config.json"
    config = json.loads(path.read_bytes()) if path.exists() else {}
    return json.dumps({k: v for k, v in config.items() if k not in _VOLATILE}, sort_keys=True).encode()


def _sample(file: BinaryIO, size: int) -> Iterator[bytes]:
    header = file.read(8)
    yield header + file.read(min(int.from_bytes(header, "little"), size))
    start = file.tell()
    for i in range(_SAMPLES):
        file.seek(start + (size - start) * i // _SAMPLES)
        yield file.read(_SAMPLE_BYTES)
