"""Any interleaving of jobs, doubles, cancels, releases, engine events and silence, against what an attempt may do."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from splitserve.engine import door
from splitserve.prefill.jobs import PrefillJobs
from splitserve.protocol.effects import Publish
from splitserve.protocol.handle import GroupBlocks
from splitserve.protocol.messages import Accepted, Cancel, KvReady, Message, Release, Renew, Resume, ResumeRow
from splitserve.worker.effects import ToEngine
from support.worker_cores import SUBJECTS, Driver, identity, prefill_job, prefilled

Key = tuple[str, int]
TOMBSTONE_S = 60.0 - 16.0  # time passes in strides
BLOCKS = 12  # four jobs of three

rids = st.sampled_from("abc")
attempts = st.integers(1, 4)


class PrefillMachine(RuleBasedStateMachine):
    """`engine` is what the engine was told to have; `over` when an attempt ended: for a minute it must not run again."""

    def __init__(self) -> None:
        super().__init__()
        self.core = PrefillJobs(identity(blocks=BLOCKS), SUBJECTS, new_token=lambda: "t" * 32)
        self.driver = Driver(self.core)
        self.engine: dict[Key, bool] = {}  # key -> whether its blocks are held for others
        self.over: dict[Key, float] = {}
        self.answers: dict[Key, Message | None] = {}
        self.ready: dict[Key, KvReady] = {}
        self.read: set[Key] = set()  # computed, and readable in part

    def _obey(self, commands: Iterable[object]) -> None:
        for command in commands:
            if isinstance(command, ToEngine):
                self._engine_told(command.command)
            elif isinstance(command, Publish) and isinstance(command.message, KvReady) and command.message.final:
                handle = command.message.handle
                assert self.ready.setdefault((handle.rid, handle.pa), command.message) == command.message

    def _engine_told(self, command: door.Command) -> None:
        key = command.key
        assert isinstance(key, tuple)
        rid, attempt = key
        if isinstance(command, door.Add):
            assert key not in self.engine, f"{key} runs twice"
            ended = [at for over, at in self.over.items() if over[0] == rid and over[1] >= attempt]
            assert all(self.driver.now - at >= TOMBSTONE_S for at in ended), f"{key} is over and runs again"
            self.engine[key] = False
            self.ready.pop(key, None)
        else:
            assert (self.engine.pop(key) or key in self.read) == isinstance(command, door.Release)
            self.read.discard(key)
            self._ended(rid, attempt)

    def _ended(self, rid: str, attempt: int) -> None:
        self.over[rid, attempt] = self.driver.now

    @rule(rid=rids, pa=attempts)
    def asked(self, rid: str, pa: int) -> None:
        runs = (rid, pa) in self.engine
        answer = self.driver.say(prefill_job(rid, pa))
        self._obey(self.driver.commands)
        if runs:
            assert answer == self.answers[rid, pa]
        assert isinstance(answer, Accepted) == ((rid, pa) in self.engine)
        self.answers[rid, pa] = answer

    @rule(rid=rids, pa=attempts)
    def cancelled(self, rid: str, pa: int) -> None:
        self.driver.say(Cancel(rid, 7, pa, 0, "test"))
        self._obey(self.driver.commands)
        self._ended(rid, pa)
        assert not [key for key in self.engine if key[0] == rid and key[1] <= pa]

    @precondition(lambda self: not all(self.engine.values()))
    @rule(data=st.data(), fails=st.booleans())
    def engine_ends(self, data: st.DataObject, fails: bool) -> None:
        key = data.draw(st.sampled_from(sorted(key for key, held in self.engine.items() if not held)))
        read = key in self.read
        self.read.discard(key)
        if fails:
            self.engine[key] = read  # the core still lets go of what was readable
            if not read:
                del self.engine[key]
            self._ended(*key)
            self._obey(self.driver.engine(door.Failed(key, "raised")))
        else:
            self.engine[key] = True
            self._obey(self.driver.engine(prefilled(*key)))
            assert key in self.ready

    @precondition(lambda self: not all(self.engine.values()))
    @rule(data=st.data(), block=st.integers(0, 1))
    def engine_goes_on(self, data: st.DataObject, block: int) -> None:
        key = data.draw(st.sampled_from(sorted(key for key, held in self.engine.items() if not held)))
        if block and key not in self.read:
            return
        self.read.add(key)
        self._obey(self.driver.engine(door.Progress(key, 4 * block + 4, (GroupBlocks(0, (block,), (1,)),), "c")))

    @precondition(lambda self: self.ready)
    @rule(data=st.data(), token=st.sampled_from(("t" * 32, "x" * 32)))
    def released(self, data: st.DataObject, token: str) -> None:
        key = data.draw(st.sampled_from(sorted(self.ready)))
        held = key in self.engine
        self.driver.say(Release(self.ready[key].handle.id, token))
        self._obey(self.driver.commands)
        assert (key in self.engine) == (held and token != "t" * 32)

    @precondition(lambda self: self.ready)
    @rule()
    def renewed(self) -> None:
        self.driver.say(Renew(tuple(ready.handle.id for ready in self.ready.values())))
        self._obey(self.driver.commands)

    @rule(rid=rids, pa=attempts)
    def resumed(self, rid: str, pa: int) -> None:
        self.driver.say(Resume("r1", 7, (ResumeRow(rid, pa, 0, 0),)))
        self._obey(self.driver.commands)

    @rule(seconds=st.sampled_from((0.5, 3.0, 16.0)), heard=st.booleans())
    def time_passes(self, seconds: float, heard: bool) -> None:
        self._obey(self.driver.beats(seconds, *(["r1"] if heard else [])))

    @invariant()
    def leases_are_what_the_engine_holds(self) -> None:
        assert len(self.core.leases) == sum(self.engine.values()) + len(self.read)

    @invariant()
    def promises_fit_and_work_has_a_timer(self) -> None:
        assert 3 * len(self.engine) == self.core.promised_blocks <= BLOCKS
        assert not self.engine or self.core.wake_at() is not None

    def teardown(self) -> None:
        self._obey(self.driver.after(700.0))
        assert not self.engine
        assert self.core.idle


TestPrefillJobs = PrefillMachine.TestCase
TestPrefillJobs.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
