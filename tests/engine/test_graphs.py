"""Captured decode steps: what is padded, what is written, when they are used, and that they answer as steps do that are
launched one by one. The graphs are fakes that call what they recorded; the model and the pool are real."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from splitserve.config import EngineSettings, ModelSettings
from splitserve.engine.attention.base import AttentionBackend
from splitserve.engine.attention.torch_backend import TorchBackend
from splitserve.engine.batch import StepRow
from splitserve.engine.cuda.capture import GraphedModel, capture_decodes
from splitserve.engine.cuda.flashinfer_backend import FlashInferBackend
from splitserve.engine.cuda.graphs import DecodeGraphs, Graph, padded, sizes
from splitserve.engine.cuda.phased import PhasedBackend
from splitserve.engine.cuda.triton_backend import TritonBackend
from splitserve.engine.engine import Engine
from splitserve.engine.forward import PagedModel
from splitserve.engine.loader import LoadedModel, load_model
from splitserve.engine.runner import TorchRunner
from splitserve.engine.sampler import Sampler
from splitserve.engine.sequence import EngineConfig
from splitserve.kv.pool import BlockPool
from splitserve.kv.prefix import PrefixIndex
from splitserve.kv.storage import KvStorage
from splitserve.protocol.params import SamplingParams
from support import fake_attention
from support.captured import GatherBackend, Replayed
from support.tiny_models import ADMITTED, save_model
from support.torch_engines import answers, engine_over, load
from support.triton_mode import needs_triton

BLOCKS, WIDTH, MOST = 24, 6, 5
CPU = torch.device("cpu")
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("llama")
    save_model(ADMITTED["llama"](), folder)
    return load(folder)


@dataclass(frozen=True)
class Bench:
    """A model over a pool with one scratch block behind it."""

    storage: KvStorage
    eager: PagedModel
    graphs: DecodeGraphs | None


def bench(
    loaded: LoadedModel,
    backend: AttentionBackend[Any],
    record: Callable[[Callable[[], torch.Tensor]], Graph] = Replayed,
) -> Bench:
    storage = KvStorage(loaded.layout, BLOCKS + 1)
    eager = PagedModel(loaded.model, loaded.layers, backend, storage)
    graphs = capture_decodes(
        loaded.model, loaded.layers, backend, storage, eager, blocks=BLOCKS, width=WIDTH, most=MOST, record=record
    )  # fmt: skip
    return Bench(storage, eager, graphs)


def capturable(loaded: LoadedModel, name: str) -> PhasedBackend:
    size = loaded.layout.block_tokens
    decodes: AttentionBackend[Any] = GatherBackend(size) if name == "gather" else TritonBackend(size, CPU, units=8)
    return PhasedBackend(decodes, TorchBackend(size))


def prompts(lengths: list[int]) -> list[list[int]]:
    generator = np.random.default_rng(5)
    return [generator.integers(3, 96, length).tolist() for length in lengths]


def step_of(loaded: LoadedModel, lengths: list[int], eager: PagedModel) -> list[StepRow]:
    """Sequences of these lengths in the pool, and one token more for each."""
    size, free = loaded.layout.block_tokens, list(range(BLOCKS))
    rows: list[StepRow] = []
    for ids in prompts(lengths):
        table = [free.pop() for _ in range(len(ids) // size + 1)]
        if ids[:-1]:
            eager.logits([StepRow(ids[:-1], 0, [table])], 0, [])
        rows.append(StepRow(ids[-1:], len(ids) - 1, [table]))
    return rows


@pytest.mark.parametrize("name", ["gather", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("lengths", [[1], [40, 3], [5, 17, 33], [16, 15, 1, 70, 2]])
def test_a_captured_step_gives_the_logits_of_the_same_step_launched_one_by_one(
    loaded: LoadedModel, name: str, lengths: list[int]
) -> None:
    made = bench(loaded, capturable(loaded, name))
    assert made.graphs is not None
    rows = step_of(loaded, lengths, made.eager)
    model = GraphedModel(made.eager, made.graphs)
    expected = made.eager.logits(rows, len(rows), range(len(rows)))
    before = made.storage.bytes.clone()
    for _ in range(2):
        torch.testing.assert_close(model.logits(rows, len(rows), range(len(rows))), expected, atol=1e-4, rtol=1e-4)
    scratch = BLOCKS * loaded.layout.block_bytes
    torch.testing.assert_close(
        made.storage.bytes[:scratch].view(torch.float32), before[:scratch].view(torch.float32), atol=1e-5, rtol=1e-5
    )


def test_flashinfers_plan_is_made_anew_before_each_replay(tmp_path: Path) -> None:
    """Over its documented interface: a wrapper of a graph reads its buffers, which only a plan fills."""
    config = tf.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=128,
    )  # fmt: skip
    save_model(config, tmp_path)
    engine = EngineSettings(device="cpu", threads=1, attention_backend="torch")
    loaded = load_model(tmp_path, model=ModelSettings(dtype="bfloat16"), engine=engine)
    backend = FlashInferBackend(fake_attention, loaded.layout.block_tokens, CPU, torch.bfloat16)
    made = bench(loaded, PhasedBackend(backend, backend))
    assert made.graphs is not None
    for lengths in ([30, 2, 19], [1, 1], [64, 50, 3, 2, 1]):
        rows = step_of(loaded, lengths, made.eager)
        expected = made.eager.logits(rows, len(rows), range(len(rows))).float()
        got = made.graphs.logits(rows).float()
        torch.testing.assert_close(got, expected, atol=0.05, rtol=0.05)


def test_padding_writes_only_into_the_scratch_block(loaded: LoadedModel) -> None:
    made = bench(loaded, capturable(loaded, "gather"))
    assert made.graphs is not None
    rows = step_of(loaded, [4, 20, 9], made.eager)
    made.storage.bytes.fill_(0x11)
    made.graphs.logits(rows)  # three rows in a graph of four
    size = loaded.layout.block_bytes
    written = [block for block in range(BLOCKS + 1) if bool((made.storage.bytes[block * size :][:size] != 0x11).any())]
    touched = {row.tables[0][row.start // loaded.layout.block_tokens] for row in rows}
    assert set(written) == touched | {BLOCKS}


def test_rows_are_padded_to_the_next_number_that_was_captured(loaded: LoadedModel) -> None:
    graphs: list[Replayed] = []

    def record(step: Callable[[], torch.Tensor]) -> Graph:
        graphs.append(Replayed(step))
        return graphs[-1]

    made = bench(loaded, capturable(loaded, "gather"), record)
    assert made.graphs is not None
    assert made.graphs.sizes == (1, 2, 4, 5)
    before = [graph.replays for graph in graphs]
    for count in (1, 2, 3, 4, 5):
        assert made.graphs.logits(step_of(loaded, [3] * count, made.eager)).shape[0] == count
    by_size = {graph.output.shape[0]: graph.replays - b for graph, b in zip(graphs, before)}
    assert by_size == {1: 1, 2: 1, 4: 2, 5: 1}


def test_what_no_graph_takes_is_launched_one_by_one(loaded: LoadedModel) -> None:
    made = bench(loaded, capturable(loaded, "gather"))
    assert made.graphs is not None
    decode = StepRow([7], 3, [[0]])
    assert made.graphs.takes([decode] * MOST)
    assert not made.graphs.takes([])
    assert not made.graphs.takes([decode] * (MOST + 1))
    assert not made.graphs.takes([decode, StepRow([7, 8], 0, [[1]])])
    assert not made.graphs.takes([StepRow([7], 3, [list(range(WIDTH + 1))])])


def test_the_numbers_captured_are_powers_of_two_and_the_most() -> None:
    assert [sizes(most) for most in (1, 2, 3, 8, 48)] == [
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 4, 8),
        (1, 2, 4, 8, 16, 32, 48),
    ]


def test_padding_stands_at_the_first_position_of_the_scratch_block() -> None:
    step = padded([StepRow([9], 20, [[4, 2]])], 3, scratch=30, block_tokens=16)
    assert step.ids.tolist() == [9, 0, 0]
    assert step.positions.tolist() == [20, 0, 0]
    assert step.context.kv_len.tolist() == [21, 1, 1]
    assert step.context.slots[0].tolist() == [2 * 16 + 4, 30 * 16, 30 * 16]


def test_a_whole_engine_answers_from_graphs_as_without_them(loaded: LoadedModel) -> None:
    made = bench(loaded, capturable(loaded, "gather"))
    assert made.graphs is not None
    runner = TorchRunner(GraphedModel(made.eager, made.graphs), Sampler(loaded.eos_ids, loaded.vocab_size))
    config = EngineConfig(
        block_tokens=loaded.layout.block_tokens, max_num_seqs=4, chunk_tokens=16, max_model_len=WIDTH * 16,
        eos_ids=frozenset(loaded.eos_ids), fingerprint="f", prefix_caching=True,
    )  # fmt: skip
    pool = BlockPool(BLOCKS)
    engine = Engine(config, pool, PrefixIndex(pool), runner, time.monotonic)
    asked = prompts([5, 40, 17, 3, 22, 9])
    expected = answers(engine_over(loaded, chunk=16), asked, GREEDY)
    assert [answer.ids for answer in answers(engine, asked, GREEDY)] == [answer.ids for answer in expected]


def test_a_backend_that_cannot_be_captured_serves_without_graphs(
    loaded: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "splitserve.engine"):
        assert bench(loaded, TorchBackend(loaded.layout.block_tokens)).graphs is None
    assert "attention by torch cannot be captured" in str([record.__dict__ for record in caplog.records])


def test_graphs_that_answer_wrongly_are_not_used(loaded: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    class Stale(Replayed):
        def replay(self) -> None:
            """What a graph does that was captured over other tensors: nothing that is asked of it."""

    with caplog.at_level(logging.INFO, "splitserve.engine"):
        assert bench(loaded, capturable(loaded, "gather"), Stale).graphs is None
    assert "captured steps are off by" in str([record.__dict__ for record in caplog.records])


def test_a_model_that_a_capture_forbids_serves_without_graphs(
    loaded: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    def record(step: Callable[[], torch.Tensor]) -> Graph:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert bench(loaded, capturable(loaded, "gather"), record).graphs is None
    assert "decode steps cannot be captured" in caplog.text
