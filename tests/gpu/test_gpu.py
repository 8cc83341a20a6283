"""What only a GPU can show; skipped without one. The same things are tried elsewhere over fakes of CUDA."""

from __future__ import annotations

import logging
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import httpx
import pytest
import torch
from tokenizers import Tokenizer

from splitserve.config import TransferSettings
from splitserve.engine.attention.torch_backend import TorchBackend
from splitserve.engine.cuda.choose import CHUNKS, DECODES, Setting, choose
from splitserve.faultpoints import Faults
from splitserve.kv.cuda import Cuda, load_cuda
from splitserve.kv.device import DeviceMemory
from splitserve.kv.storage import device_bytes
from splitserve.kv.transfer.reader import KvReader
from splitserve.protocol.params import SamplingParams
from support.attention import BLOCK, LAYERS, RAGGED, check
from support.cluster import running
from support.kv import ALL, BLOCKS, content, local_block, local_segment, owner_process, pairs_of
from support.reference import NEW_TOKENS, references
from support.tiny_models import ADMITTED, VOCABULARY, save_model
from support.torch_engines import answers, engine_over, load

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")]

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


@pytest.fixture
def cuda() -> Cuda:
    return load_cuda()


@pytest.fixture
def memory(cuda: Cuda) -> Generator[DeviceMemory]:
    made = DeviceMemory(cuda, 40, 4096, private=1, buffer_bytes=3 * 4096)
    yield made
    made.close()


def test_torch_and_the_transports_see_the_same_bytes(memory: DeviceMemory) -> None:
    tensor = device_bytes(memory.address, memory.size).view(-1, 4096)
    tensor.copy_(torch.arange(41, dtype=torch.uint8)[:, None].expand(-1, 4096))
    torch.cuda.synchronize()
    order = [7, 3, 4, 5, 39, 0, 1]
    assert b"".join(memory.outgoing(order)) == b"".join(bytes([block]) * 4096 for block in order)
    for place in memory.incoming([9, 2]):
        place[:] = bytes([200]) * len(place)
    assert [int(tensor[block].min()) for block in (9, 2, 3)] == [200, 200, 3]


@pytest.mark.parametrize("transport", ["cuda_ipc", "tcp"])
async def test_blocks_of_another_processs_gpu_memory_are_fetched(
    cuda: Cuda, tmp_path: Path, transport: Literal["cuda_ipc", "tcp"]
) -> None:
    with owner_process(tmp_path, transport, "gpu") as p:
        segment = local_segment(cuda=cuda)
        reader = KvReader(segment, TransferSettings(kv_transport=transport), Faults())
        try:
            result = await reader.fetch(p.handle, pairs_of(ALL))
            assert result.transport == transport
            assert all(local_block(segment, block) == content(block) for block in range(BLOCKS))
        finally:
            await reader.close()
            segment.close()


@pytest.mark.parametrize("name", LAYERS)
def test_torchs_attention_is_exact_on_a_gpu(name: str) -> None:
    layer = LAYERS[name]
    on_gpu = layer if layer.sinks is None else replace(layer, sinks=layer.sinks.cuda())
    check(on_gpu, RAGGED, tolerance=1e-4, backend=TorchBackend(BLOCK, "cuda"), device="cuda")


@pytest.mark.parametrize("candidate", [*DECODES, *CHUNKS[1:]], ids=lambda candidate: candidate.package)
@pytest.mark.parametrize("window", [None, 100])
def test_each_installed_backend_passes_its_trial(
    candidate: object, window: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip(candidate.package)  # type: ignore[attr-defined]
    layer = replace(LAYERS["grouped"], heads=8, kv_heads=2, k_dim=128, v_dim=128, scale=0.08, window=window)
    decodes, chunks = ((candidate,), ()) if candidate in DECODES else ((), (candidate,))
    at = Setting(256, torch.device("cuda"), torch.bfloat16)
    with caplog.at_level(logging.INFO, "splitserve.engine"):
        chosen = choose([layer], at, decodes, chunks)  # type: ignore[arg-type]
    assert chosen is not None, [record.__dict__ for record in caplog.records]


@pytest.mark.parametrize("name", ["llama", "gemma3, window 9", "gpt_oss, window 9"])
def test_a_gpu_answers_as_a_cpu_does(name: str, tmp_path: Path) -> None:
    save_model(ADMITTED[name](), tmp_path)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (1, 23, 40, 11)]
    expected = answers(engine_over(load(tmp_path), chunk=7), prompts, GREEDY)
    got = answers(engine_over(load(tmp_path, device="cuda"), chunk=7), prompts, GREEDY)
    assert [answer.ids for answer in got] == [answer.ids for answer in expected]


def test_decode_steps_of_llama_are_captured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model(ADMITTED["llama"](), tmp_path)
    with caplog.at_level(logging.INFO, "splitserve.engine"):
        engine_over(load(tmp_path, device="cuda"), chunk=7)
    assert "decode steps captured" in caplog.text


@pytest.mark.e2e
@pytest.mark.model
@pytest.mark.parametrize("transport", ["cuda_ipc", "tcp"])
def test_a_split_answer_on_gpus_is_generates(
    smollm2_folder: Path, run_folder: Path, tmp_path: Path, transport: str
) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))
    clear = [reference for reference in references(smollm2_folder, run_folder) if min(reference.gaps) > 0.01][:8]
    flags = ("--device", "cuda", "--dtype", "float32", "--kv-cache-memory-bytes", "1GiB", "--split", "always")
    with running(tmp_path, *flags, "--kv-transport", transport, model=smollm2_folder) as cluster:
        for reference in clear:
            body = {
                "model": cluster.model, "prompt": reference.prompt, "max_tokens": NEW_TOKENS, "temperature": 0,
                "ignore_eos": True, "skip_special_tokens": False,
            }  # fmt: skip
            answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=120).json()
            assert answer["choices"][0]["text"] == tokenizer.decode(reference.ids, skip_special_tokens=False)
