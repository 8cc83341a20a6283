"""Steps of the engine on a GPU against what its memory and its matrix units can do: a model of random weights in the shape of
Llama 3.1 8B, bf16. Decode of 32 sequences at a context of 1,024 tokens beside the time to read weights and KV once; a
prompt of 4,096 tokens beside the rate of one large product; and 32 requests of 1,024 in, 128 out to the end, beside
transformers' own continuous batching of the same model on the same GPU.

`python benchmarks/engine_cuda.py [--repeats 20]`, a GPU of 40 GB or more. `benchmarks/kv_cuda.py` measures KV on its way.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from splitserve.config import EngineSettings
from splitserve.engine import door
from splitserve.engine.attention.chosen import ChosenBackend
from splitserve.engine.attention.torch_backend import TorchBackend
from splitserve.engine.batch import Runner, SampleRow, StepBatch, StepRow
from splitserve.engine.build import build_engine, build_runner
from splitserve.engine.context import ATTENTION_NAME, register_attention
from splitserve.engine.cuda.choose import Setting, choose
from splitserve.engine.loader import LoadedModel, kv_layout
from splitserve.engine.probe import probe
from splitserve.protocol.params import SamplingParams

BLOCK = 16
ROWS, CONTEXT, PROMPT = 32, 1024, 4096
REQUESTS, ASKED, ANSWER = 32, 1024, 128
GREEDY = SamplingParams(max_tokens=ANSWER, temperature=0.0, ignore_eos=True)


def llama_8b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Of one measurement; the test of this file takes small ones."""

    rows: int = ROWS
    context: int = CONTEXT
    prompt: int = PROMPT


def random_model(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """As `load_model` would make it, of weights that need no file."""
    register_attention()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)
    model.eval().requires_grad_(False)
    backend = ChosenBackend(TorchBackend(BLOCK, device))
    layers = probe("random", model, backend)
    if device.type == "cuda":
        backend.promote(choose(layers.values(), Setting(BLOCK, device, dtype)) or backend.current)
    name = str(dtype).removeprefix("torch.")
    size = sum(parameter.nbytes for parameter in model.parameters())
    return LoadedModel(
        name="random", model=model, config=config, layers=layers, backend=backend, kernels=None,
        layout=kv_layout(layers, BLOCK, name), fingerprint="", fingerprint_factors=(), eos_ids=(),
        vocab_size=config.vocab_size, max_model_len=config.max_position_embeddings, context_asked=False, dtype=name,
        device=device, weight_bytes=size,
    )  # fmt: skip


def median_s(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """After three warm ones; each with all its work done."""
    times: list[float] = []
    for _ in range(repeats + 3):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


def copy_rate(device: torch.device, repeats: int, size: int = 2 << 30) -> float:
    """Bytes read and written a second by a copy inside the device."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_s(lambda: target.copy_(source), repeats, device)


def product_rate(device: torch.device, repeats: int, side: int = 8192) -> float:
    """Floating-point operations a second of a square bf16 product."""
    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * side**3 / median_s(lambda: left @ right, repeats, device)


def decode_s(loaded: LoadedModel, runner: Runner, sizes: Sizes, repeats: int) -> float:
    """Seconds of a whole step: model, sampling, ids on the host."""
    blocks = -(-sizes.context // BLOCK)
    rows = tuple(
        StepRow([7], sizes.context - 1, [list(range(i * blocks, (i + 1) * blocks))], (SampleRow(GREEDY, 1, 0, 1, [7]),))
        for i in range(sizes.rows)
    )
    return median_s(lambda: runner.execute(StepBatch(rows, len(rows))), repeats, loaded.device)


def prefill_s(loaded: LoadedModel, runner: Runner, sizes: Sizes, repeats: int) -> float:
    ids = np.random.default_rng(0).integers(0, loaded.vocab_size, sizes.prompt).tolist()
    row = StepRow(ids, 0, [list(range(-(-sizes.prompt // BLOCK)))], (SampleRow(GREEDY, 1, 0, len(ids), ids),))
    return median_s(lambda: runner.execute(StepBatch((row,), 0)), repeats, loaded.device)


def bytes_of_step(loaded: LoadedModel, sizes: Sizes) -> int:
    """What a decode step must read: each weight but the embedding's other rows, and all KV."""
    embedding: Any = loaded.model.get_input_embeddings()
    return loaded.weight_bytes - embedding.weight.nbytes + sizes.rows * sizes.context * loaded.layout.bytes_per_token


def operations_of_prompt(loaded: LoadedModel, tokens: int) -> int:
    """Products of the layers for each token, the causal half of attention, and one row of the head."""
    config: Any = loaded.config
    linear = sum(
        parameter.numel()
        for name, parameter in loaded.model.named_parameters()
        if parameter.dim() == 2 and not name.startswith(("lm_head", "model.embed_tokens"))
    )
    heads = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 2 * linear * tokens + 2 * heads * tokens**2 + 2 * config.vocab_size * config.hidden_size


def engine_tokens_per_s(loaded: LoadedModel, prompts: Sequence[Sequence[int]], params: SamplingParams) -> float:
    """All prompts added at once, to the last token."""
    need = sum(-(-(len(prompt) + params.max_tokens) // BLOCK) + 1 for prompt in prompts)
    settings = EngineSettings(max_num_seqs=len(prompts), max_num_batched_tokens=2048, enable_prefix_caching=False)
    engine = build_engine(loaded, None, None, need, settings, "prefill", time.monotonic)
    started = time.perf_counter()
    for key, prompt in enumerate(prompts):
        engine.submit(door.Add(key, door.Mode.LOCAL, tuple(prompt), len(prompt), ((),), params, (key,)))
    tokens = 0
    while engine.has_work:
        batch = engine.step()
        tokens += sum(len(e.ids) for e in (batch.events if batch else ()) if isinstance(e, door.TokenEvent))
    return tokens / (time.perf_counter() - started)


def transformers_tokens_per_s(loaded: LoadedModel, prompts: Sequence[Sequence[int]], params: SamplingParams) -> float:
    model: Any = loaded.model
    model.set_attn_implementation("sdpa")  # its own paged attention takes it from there
    try:
        settings = GenerationConfig(max_new_tokens=params.max_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        started = time.perf_counter()
        found = model.generate_batch([list(prompt) for prompt in prompts], generation_config=settings)
        return sum(len(output.generated_tokens) for output in found.values()) / (time.perf_counter() - started)
    finally:
        model.set_attn_implementation(ATTENTION_NAME)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    if not torch.cuda.is_available():
        sys.exit("engine_cuda: torch sees no GPU here, and this measures nothing else")
    device, sizes = torch.device("cuda"), Sizes()
    loaded = random_model(llama_8b(), device, torch.bfloat16)
    blocks = max(sizes.rows * -(-sizes.context // BLOCK), -(-sizes.prompt // BLOCK))
    runner = build_runner(loaded, blocks, None, sizes.rows)
    bandwidth, rate = copy_rate(device, repeats), product_rate(device, repeats)
    print(f"{torch.cuda.get_device_name()}, attention: {loaded.backend.name}")
    print(f"copy {bandwidth / 1e9:.0f} GB/s, bf16 product {rate / 1e12:.0f} TFLOP/s")
    floor, found = bytes_of_step(loaded, sizes) / bandwidth, decode_s(loaded, runner, sizes, repeats)
    print(
        f"decode, {sizes.rows} rows at {sizes.context}: {found * 1e3:.2f} ms, "
        f"{found / floor:.2f}x the floor of {floor * 1e3:.2f} ms (bar 1.3)"
    )
    found = prefill_s(loaded, runner, sizes, repeats)
    reached = operations_of_prompt(loaded, sizes.prompt) / found
    print(
        f"prefill {sizes.prompt}: {found * 1e3:.1f} ms, {reached / 1e12:.0f} TFLOP/s, {reached / rate:.0%} (bar 50 %)"
    )
    del runner
    prompts = np.random.default_rng(1).integers(0, loaded.vocab_size, (REQUESTS, ASKED)).tolist()
    warm = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    for name, measure in (("engine", engine_tokens_per_s), ("transformers", transformers_tokens_per_s)):
        measure(loaded, prompts[:4], warm)
        print(f"{REQUESTS} x {ASKED}/{ANSWER}, {name}: {measure(loaded, prompts, GREEDY):.0f} tokens/s")


if __name__ == "__main__":
    main()
