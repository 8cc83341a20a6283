"""The compiled attention kernels: built once, tried before they serve, changed to between steps. Needs a CPU and a compiler."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from splitserve.config import EngineSettings, ModelSettings
from splitserve.engine.attention.base import LayerAttention
from splitserve.engine.attention.chosen import ChosenBackend
from splitserve.engine.attention.native_backend import NativeBackend
from splitserve.engine.attention.torch_backend import TorchBackend
from splitserve.engine.attention.trial import refuse_wrong
from splitserve.engine.batch import StepRow
from splitserve.engine.forward import forward_context
from splitserve.engine.kernels import Kernels
from splitserve.engine.loader import load_model
from splitserve.engine.native import library
from splitserve.errors import ConfigError, DependencyMissing
from splitserve.kv.layout import LayerKV, attention_layout
from splitserve.kv.storage import KvStorage, LayerView
from support.tiny_models import FUSABLE, save_model

PLAIN = LayerAttention(layer=0, heads=9, kv_heads=3, k_dim=64, v_dim=64, scale=0.125)
SHAPES = {
    "three query heads a KV head": PLAIN,
    "one query head a KV head": replace(PLAIN, heads=4, kv_heads=4, k_dim=32, v_dim=32),
    "eight query heads a KV head": replace(PLAIN, heads=8, kv_heads=1, k_dim=128, v_dim=128),
    "seven query heads a KV head": replace(PLAIN, heads=14, kv_heads=2),
    "K wider than V": replace(PLAIN, heads=4, kv_heads=2, k_dim=96),
    "the widest head": replace(PLAIN, heads=4, kv_heads=1, k_dim=256, v_dim=256, scale=0.0625),
    "a window of one": replace(PLAIN, window=1),
    "a window inside a block": replace(PLAIN, window=5),
    "a window over tiles": replace(PLAIN, window=150),
}


@pytest.mark.model
@pytest.mark.parametrize("block_tokens", [16, 48])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_ragged_step_is_within_the_bound_of_float32(kernels: Path, shape: str, block_tokens: int) -> None:
    backend = NativeBackend(block_tokens, torch.bfloat16)
    assert refuse_wrong(backend, [SHAPES[shape]], block_tokens, torch.bfloat16) is None


@pytest.mark.model
@pytest.mark.parametrize("rows", [[(0, 1)], [(0, 200)], [(511, 1), (15, 1), (16, 1)], [(1000, 3), (127, 129)]])
def test_what_lies_in_unused_slots_is_never_read_into_an_answer(kernels: Path, rows: list[tuple[int, int]]) -> None:
    out, view, tables = _filled_with_nan(rows)
    assert torch.isfinite(out).all()
    for (start, count), table in zip(rows, tables, strict=True):
        stored = view.k[table].transpose(1, 2).flatten(0, 1)
        assert torch.isfinite(stored[: start + count]).all()
        assert torch.isnan(stored[start + count :]).all()


@pytest.mark.model
def test_two_threads_give_what_one_gives(kernels: Path) -> None:
    rows = [(300, 1), (700, 1), (17, 1), (0, 333), (64, 200)]  # the second is cut between its KV heads
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = _filled_with_nan(rows)[0]
        torch.set_num_threads(2)
        assert torch.equal(_filled_with_nan(rows)[0], alone)
    finally:
        torch.set_num_threads(before)


def _filled_with_nan(rows: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, LayerView, list[list[int]]]:
    """A step over a pool whose unwritten slots are NaN."""
    generator = torch.Generator().manual_seed(3)

    def draw(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, 64, generator=generator).bfloat16()

    needed = [-(-sum(row) // 16) for row in rows]
    storage = KvStorage(attention_layout(16, [LayerKV(0, 3, 64, 64, "bfloat16")]), sum(needed))
    view = storage.view(0)
    view.k.fill_(float("nan"))
    view.v.fill_(float("nan"))
    blocks = iter(range(storage.blocks))
    tables = [[next(blocks) for _ in range(count)] for count in needed]
    for (start, _), table in zip(rows, tables, strict=True):
        for position in range(start):
            view.k[table[position // 16], :, position % 16] = draw(1, 3)[0]
            view.v[table[position // 16], :, position % 16] = draw(1, 3)[0]
    tokens = sum(count for _, count in rows)
    backend = NativeBackend(16, torch.bfloat16)
    decodes = next((i for i, row in enumerate(rows) if row[1] > 1), len(rows))
    step = [StepRow([0] * count, start, [table]) for (start, count), table in zip(rows, tables, strict=True)]
    plan = backend.plan(forward_context(step, decodes, 16))
    return backend.forward(PLAIN, draw(tokens, 9), draw(tokens, 3), draw(tokens, 3), view, plan), view, tables


@pytest.mark.model
def test_a_model_is_checked_and_served_by_the_kernels_when_they_are_asked_for(
    kernels: Path, smollm2_folder: Path
) -> None:
    torch.set_num_threads(1)
    settings = EngineSettings(device="cpu", threads=1, attention_backend="native")
    loaded = load_model(smollm2_folder, model=ModelSettings(dtype="bfloat16"), engine=settings)
    assert loaded.backend.name == "native"


def test_kernels_that_give_wrong_numbers_are_not_used() -> None:
    class Wrong(TorchBackend):
        def forward(self, layer, query, key, value, view, plan):  # type: ignore[no-untyped-def]
            return super().forward(layer, query, key, value, view, plan) * 1.02

    refusal = refuse_wrong(Wrong(16), [PLAIN], 16, torch.bfloat16)
    assert refusal is not None
    assert "the bound is 0.01" in refusal


@pytest.mark.parametrize(
    ("layer", "block_tokens", "dtype", "why"),
    [
        (PLAIN, 16, torch.float32, "bfloat16"),
        (PLAIN, 8, torch.bfloat16, "multiple of 16"),
        (replace(PLAIN, k_dim=80), 16, torch.bfloat16, "80"),
        (replace(PLAIN, softcap=30.0), 16, torch.bfloat16, "softcap"),
        (replace(PLAIN, sinks=torch.zeros(9)), 16, torch.bfloat16, "sinks"),
    ],
)
def test_what_the_kernels_do_not_know_is_refused_by_name(
    layer: LayerAttention, block_tokens: int, dtype: torch.dtype, why: str
) -> None:
    refusal = NativeBackend(block_tokens, dtype).supports(layer)
    assert refusal is not None
    assert why in refusal


def test_without_a_compiler_torch_goes_on_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("splitserve.engine.kernels.library.library_path", lambda cache: cache / "none.so")
    chosen = ChosenBackend(TorchBackend(16))
    model = save_model(FUSABLE["llama"](), tmp_path)
    layout = attention_layout(16, [LayerKV(0, 2, 32, 32, "bfloat16")])
    assert not Kernels(chosen, model, {}, layout, tmp_path).build()
    assert chosen.name == "torch"


def test_a_compiler_that_fails_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'attention.cpp:1: error: no such luck' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(DependencyMissing, match=r"ended with 3: .*no such luck"):
        library.build(tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.so"))
    assert not list((tmp_path / "cache").rglob("building-*"))


def test_a_cache_that_cannot_be_written_is_a_reason_not_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/bin/true")
    (tmp_path / "file").write_text("")
    with pytest.raises(DependencyMissing, match="file"):
        library.build(tmp_path / "file")


def test_a_step_stays_with_the_backend_that_planned_it() -> None:
    class Named(TorchBackend):
        name = "later"

    chosen = ChosenBackend(TorchBackend(16))
    context = forward_context([StepRow([0], 0, [[0]])], 1, 16)
    before = chosen.plan(context)
    worker = threading.Thread(target=lambda: chosen.promote(Named(16)))
    worker.start()
    worker.join()
    assert before.backend.name == "torch"
    assert chosen.plan(context).backend.name == chosen.name == "later"


@pytest.mark.model
def test_asking_for_kernels_that_a_model_cannot_have_is_one_clear_line(smollm2_folder: Path) -> None:
    settings = EngineSettings(device="cpu", threads=1, attention_backend="native")
    with pytest.raises(ConfigError, match="--attention-backend native: the kernels are for bfloat16"):
        load_model(smollm2_folder, model=ModelSettings(dtype="float32"), engine=settings)
