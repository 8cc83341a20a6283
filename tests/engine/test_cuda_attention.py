"""The attention backends for GPUs, as far as a CPU can show: what they give FlashInfer and FlashAttention, the Triton kernel
in its interpreter and through its compiler, and which of them is chosen."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from splitserve.engine.attention.base import AttentionBackend, LayerAttention
from splitserve.engine.attention.torch_backend import TorchBackend
from splitserve.engine.batch import StepRow
from splitserve.engine.cuda.choose import Candidate, Setting, choose
from splitserve.engine.cuda.flash_attn_backend import FlashAttnBackend
from splitserve.engine.cuda.flashinfer_backend import FlashInferBackend
from splitserve.engine.cuda.pages import pages_of
from splitserve.engine.cuda.phased import PhasedBackend, rows_of
from splitserve.engine.cuda.triton_backend import TritonBackend
from splitserve.engine.forward import forward_context
from support import fake_attention
from support.attention import BLOCK, LAYERS, PLAIN, RAGGED, Row, check
from support.processes import ROOT, environment
from support.triton_mode import needs_triton

CPU = torch.device("cpu")
WIDE = replace(PLAIN, k_dim=64, v_dim=64, scale=0.1)
SIXTEEN_BITS = {
    name: replace(layer, k_dim=64, v_dim=64, scale=0.1) for name, layer in LAYERS.items() if layer.sinks is None
}


def flashinfer(block: int = BLOCK) -> FlashInferBackend:
    return FlashInferBackend(fake_attention, block, CPU, torch.bfloat16)


def flash_attn(block: int = 256) -> FlashAttnBackend:
    return FlashAttnBackend(fake_attention, block, CPU, torch.bfloat16)


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_flashinfer_is_given_what_its_documentation_asks_for(name: str) -> None:
    backend = PhasedBackend(flashinfer(), flashinfer())
    check(SIXTEEN_BITS[name], RAGGED, torch.bfloat16, 0.03, backend=backend)
    check(SIXTEEN_BITS[name], [Row(3, 1), Row(9, 1)], torch.bfloat16, 0.03, backend=backend)  # planned anew


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_flash_attention_is_given_our_blocks_with_two_strides_exchanged(name: str) -> None:
    rows = [Row(0, 1), Row(300, 1), Row(0, 9), Row(250, 20)]
    check(SIXTEEN_BITS[name], rows, torch.bfloat16, 0.03, backend=flash_attn(), block=256)


@needs_triton
@pytest.mark.parametrize("units", [1, 40], ids=["one part", "many parts"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_triton_kernel_is_exact(name: str, units: int) -> None:
    check(LAYERS[name], RAGGED, backend=PhasedBackend(TritonBackend(BLOCK, CPU, units), TorchBackend(BLOCK)))


@needs_triton
def test_a_part_of_a_sequence_that_has_no_key_takes_no_weight() -> None:
    backend = TritonBackend(BLOCK, CPU, units=1000)
    check(PLAIN, [Row(0, 1), Row(1, 1), Row(200, 1)], backend=backend)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from splitserve.engine.cuda.triton_kernels import attend_part, join_parts
POINTERS = {"query": "*bf16", "keys": "*bf16", "values": "*bf16", "tables": "*i64", "kv_len": "*i64", "log_sum": "*fp32",
    "parts": "*fp32", "sinks": "*fp32", "scale": "fp32"}
SIZES = dict(GROUP=4, GROUP_PADDED=16, K_DIM=128, K_PADDED=128, V_DIM=128, V_PADDED=128, BLOCK=16, TILE=64, PARTS=4,
    WINDOW=0, SOFTCAP=0.0, HAS_SINKS=True)
for kernel, out in ((attend_part, "*fp32"), (join_parts, "*bf16")):
    sizes = {name: value for name, value in SIZES.items() if name in kernel.arg_names}
    types = {name: "constexpr" if name in sizes else POINTERS.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, types | {"out": out}, sizes)
    for capability in (80, 90):
        made = compile(source, target=GPUTarget("cuda", capability, 32))
        print(kernel.__name__, capability, made.metadata.shared, "mma" in made.asm["ptx"], len(made.asm["cubin"]) > 0)
"""


@needs_triton
@pytest.mark.slow
def test_the_triton_kernels_compile_for_an_a100_and_an_h100() -> None:
    result = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment() | {"TRITON_INTERPRET": "0"}, cwd=ROOT / "tests", capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[:2] for line in lines] == [
        [kernel, capability] for kernel in ("attend_part", "join_parts") for capability in ("80", "90")
    ]
    assert all(int(shared) <= 48 << 10 for _, _, shared, _, _ in lines)
    assert all(line[3:] == [str(line[0] == "attend_part"), "True"] for line in lines)  # its products by tensor cores


@pytest.mark.parametrize(
    ("backend", "layer", "reason"),
    [
        (flashinfer(), PLAIN, r"heads of 8 and 8 dims: FlashInfer takes equal ones of \(64, 128, 256\)"),
        (flashinfer(), replace(WIDE, sinks=torch.zeros(4)), "sinks"),
        (flashinfer(), replace(WIDE, heads=5), "5 query heads do not divide among 2"),
        (FlashInferBackend(fake_attention, BLOCK, CPU, torch.float32), WIDE, "16 bits, not torch.float32"),
        (flash_attn(16), WIDE, "blocks of a multiple of 256 tokens, not 16"),
        (flash_attn(), replace(WIDE, v_dim=32), "heads of 64 and 32 dims"),
        (flash_attn(), replace(WIDE, sinks=torch.zeros(4)), "sinks"),
    ],
)
def test_what_a_backend_cannot_give_exactly_it_refuses(
    backend: AttentionBackend[Any], layer: LayerAttention, reason: str
) -> None:
    refusal = backend.supports(layer)
    assert refusal is not None
    assert re.search(reason, refusal)


def test_a_step_of_both_kinds_is_refused_by_a_backend_that_plans_for_one() -> None:
    rows = [StepRow([0], 3, [[0]]), StepRow([0, 0], 0, [[1]])]
    with pytest.raises(ValueError, match="1 decodes and 2 rows"):
        flashinfer().plan(forward_context(rows, 1, BLOCK))


def test_pages_end_with_the_tokens_of_this_step() -> None:
    rows = [StepRow([0], BLOCK - 1, [[7, 9]]), StepRow([0], BLOCK, [[3, 5]]), StepRow([0] * 3, 0, [[8]])]
    pages = pages_of(forward_context(rows, 2, BLOCK), BLOCK)
    assert pages.indptr.tolist() == [0, 1, 3, 4]
    assert pages.indices.tolist() == [7, 3, 5, 8]
    assert pages.last_len.tolist() == [BLOCK, 1, 3]


def test_some_rows_of_a_step_are_a_step_of_their_own() -> None:
    rows = [StepRow([0], 3, [[0]]), StepRow([0], 9, [[1, 2, 3]]), StepRow([0] * 5, 2, [[4, 5]])]
    whole = forward_context(rows, 2, BLOCK)
    for first, stop in ((0, 2), (2, 3), (1, 3)):
        part = rows_of(whole, first, stop)
        alone = forward_context(rows[first:stop], max(0, 2 - first), BLOCK)
        assert part is not None
        width = alone.block_tables[0].shape[1]
        assert part.query_start.tolist() == alone.query_start.tolist()
        assert part.kv_len.tolist() == alone.kv_len.tolist()
        assert part.num_decodes == min(alone.num_decodes, stop - first)
        assert np.array_equal(part.block_tables[0][:, :width], alone.block_tables[0])
        assert part.slots[0].tolist() == alone.slots[0].tolist()
    assert rows_of(whole, 1, 1) is None


class Zeros(TorchBackend):
    """Wrong in each value."""

    name = "zeros"

    def forward(self, *arguments: Any, **named: Any) -> torch.Tensor:
        return torch.zeros_like(super().forward(*arguments, **named))


class Refuses(TorchBackend):
    def supports(self, layer: LayerAttention) -> str | None:
        return "it takes nothing"


def raising(package: Any, at: Setting) -> AttentionBackend[Any]:
    raise RuntimeError("no kernel image is available for execution on the device")


AT = Setting(16, CPU, torch.bfloat16)
WRONG = Candidate("json", lambda _, at: Zeros(at.block_tokens))
REFUSING = Candidate("json", lambda _, at: Refuses(at.block_tokens))
RAISING = Candidate("json", raising)
MISSING = Candidate("no_such_package", lambda _, at: TorchBackend(at.block_tokens))
RIGHT = Candidate("json", lambda _, at: FlashInferBackend(fake_attention, at.block_tokens, at.device, at.dtype))


def test_the_first_candidate_that_is_there_takes_the_layers_and_is_right_serves() -> None:
    chosen = choose([WIDE], AT, (MISSING, RAISING, REFUSING, WRONG, RIGHT), (WRONG, RIGHT))
    assert chosen is not None
    assert chosen.name == "flashinfer decode, flashinfer prefill"


def test_torch_serves_what_no_candidate_does() -> None:
    chosen = choose([WIDE], AT, (RIGHT,), (WRONG,))
    assert chosen is not None
    assert chosen.name == "flashinfer decode, torch prefill"
    assert choose([WIDE], AT, (WRONG, MISSING), (RAISING,)) is None
