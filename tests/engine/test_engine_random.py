"""Any interleaving of jobs, transfers, aborts, releases, preemptions and raising rows against straight runs.

A sequence's tokens depend on nothing but its prompt, seed and outputs; each job ends once; nothing is left behind.
"""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from splitserve.engine import door
from splitserve.engine.door import Mode
from splitserve.protocol.params import SamplingParams
from support.engines import LAST, Bench
from support.toy_runner import reference, toy_token

STEM = [7, 3, 7, 3, 9, 9, 1, 2, 8, 8, 8, 8, 5]  # prompts are cuts of it with a tail: they share blocks
EOS = 11
POISON = 300


class EngineMachine(RuleBasedStateMachine):
    """Small pools and batches, so that everything runs short."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts: dict[int, list[int]] = {}
        self.adds: dict[int, door.Add] = {}
        self.loaded: set[int] = set()
        self.aborted: set[tuple[int, int]] = set()

    @initialize(
        blocks=st.integers(4, 16), block_tokens=st.integers(1, 5), seats=st.integers(1, 5), chunk=st.integers(1, 12),
        caching=st.booleans(),
    )  # fmt: skip
    def start(self, blocks: int, block_tokens: int, seats: int, chunk: int, caching: bool) -> None:
        self.bench = Bench(
            blocks=blocks, block_tokens=block_tokens, max_num_seqs=seats, chunk_tokens=chunk, max_model_len=40,
            eos_ids=[EOS], prefix_caching=caching,
        )  # fmt: skip
        self.bench.runner.raises_on = {POISON}

    def expected(self, key: int, number: int) -> list[int]:
        """The whole answer of a straight run."""
        params = self.adds[key].params
        limit = min(params.max_tokens, 40 - len(self.prompts[key]))
        whole = reference(self.prompts[key], 100 + number, limit)
        ends = [at for at, token in enumerate(whole, 1) if token == EOS and at >= params.min_tokens]
        return whole[: ends[0]] if ends else whole

    @rule(
        mode=st.sampled_from(Mode), cut=st.integers(1, len(STEM)), tail=st.lists(st.integers(0, 20), max_size=8),
        max_tokens=st.integers(1, 12), min_tokens=st.integers(0, 3), done=st.lists(st.integers(0, 5), min_size=1, max_size=3),
        priority=st.integers(0, 1), poisoned=st.sampled_from([False] * 7 + [True]),
    )  # fmt: skip
    def add(
        self, mode: Mode, cut: int, tail: list[int], max_tokens: int, min_tokens: int, done: list[int], priority: int,
        poisoned: bool,
    ) -> None:  # fmt: skip
        key, prompt = len(self.adds), STEM[:cut] + tail + [POISON] * poisoned
        self.prompts[key] = prompt
        params = SamplingParams(max_tokens, min_tokens=min_tokens)
        self.adds[key] = door.Add(key, mode, (), len(prompt), (), params, ())
        outputs = [self.expected(key, number)[:count] for number, count in enumerate(done)]
        if mode is Mode.PREFILL and len(outputs) > 1:
            outputs = [[] for _ in outputs]
        single = len(outputs) == 1 and mode is not Mode.LOCAL
        if single:  # nobody prefills for an answer that is complete
            outputs = [outputs[0][: len(self.expected(key, 0)) - 1]]
        ids = [*prompt, *outputs[0]] if single else prompt
        self.bench.add(key, ids, mode, outputs=outputs, prompt_len=len(prompt), params=params, priority=priority)
        self.adds[key] = door.Add(key, mode, tuple(ids), len(prompt), (), params, tuple(range(len(outputs))))

    def ended(self, key: int) -> bool:
        return bool(self.bench.events[key]) and isinstance(self.bench.last(key), LAST)

    def alive(self, *modes: Mode) -> list[int]:
        return [key for key, add in self.adds.items() if add.mode in modes and not self.ended(key)]

    def fetching(self) -> list[int]:
        return [key for key in self.alive(Mode.AWAIT) if key not in self.loaded and self.bench.of(key, door.Reserved)]

    @precondition(lambda self: self.fetching())
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        """The transfer ends, with the first tokens of the prefill: those after what the handle covers."""
        key = data.draw(st.sampled_from(self.fetching()))
        self.finish_load(key)

    def finish_load(self, key: int) -> None:
        add = self.adds[key]
        index = len(add.ids) - add.prompt_len
        firsts = [toy_token(add.ids, 100 + number, index) for number in range(len(add.seeds))]
        self.loaded.add(key)
        self.bench.load(key, add.ids, index, firsts)

    @precondition(lambda self: self.alive(*Mode))
    @rule(data=st.data(), whole=st.booleans())
    def abort(self, data: st.DataObject, whole: bool) -> None:
        key = data.draw(st.sampled_from(self.alive(*Mode)))
        numbers: Sequence[int] = range(len(self.adds[key].seeds))
        number = None if whole else data.draw(st.sampled_from(numbers))
        self.bench.engine.submit(door.Abort(key, number))
        self.aborted.update((key, n) for n in numbers if number is None or n == number)

    @precondition(lambda self: self.alive(Mode.PREFILL))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.bench.engine.submit(door.Release(data.draw(st.sampled_from(self.alive(Mode.PREFILL)))))

    @rule()
    def answer(self) -> None:
        self.bench.answer()

    @rule(times=st.integers(1, 5))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.bench.step()

    @invariant()
    def tokens_are_those_of_a_straight_run(self) -> None:
        if not hasattr(self, "bench"):
            return
        for (key, number), output in self.bench.outputs.items():
            if isinstance(key, int) and self.adds[key].mode is not Mode.PREFILL:
                assert output == self.expected(key, number)[: len(output)]

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        for _ in self.adds:  # each round ends at least one: blocks that others wait for come back
            self.bench.run()
            for key in self.alive(Mode.PREFILL):
                self.bench.engine.submit(door.Release(key))
            for key in self.fetching():
                self.finish_load(key)
            self.bench.run()
        self.everything_has_ended()

    def everything_has_ended(self) -> None:
        for key, add in self.adds.items():
            assert self.ended(key), f"{add} never ended"
            self.complete(key, add)
        stats = self.bench.pool.stats
        assert stats.owned == stats.filling == 0
        assert sum(batch.queued_tokens for batch in self.bench.batches[-1:]) == 0

    def complete(self, key: int, add: door.Add) -> None:
        """A job that left of itself has said all of its tokens."""
        last = self.bench.last(key)
        if isinstance(last, door.Failed):
            assert POISON in add.ids, last
        if not isinstance(last, door.Gone):
            return
        if add.mode is Mode.PREFILL:
            index = len(add.ids) - add.prompt_len
            for ready in self.bench.of(key, door.Prefilled):
                assert isinstance(ready, door.Prefilled)
                assert ready.first_ids == tuple(
                    toy_token(add.ids, 100 + number, index) for number in range(len(add.seeds))
                )
            return
        for number in range(len(add.seeds)):
            if (key, number) not in self.aborted:
                assert self.bench.outputs[key, number] == self.expected(key, number)


EngineMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestEngineMachine = EngineMachine.TestCase
