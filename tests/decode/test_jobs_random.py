"""Any interleaving of jobs, amends, cancels, hand-overs, tokens and silence, against what an attempt may do."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from splitserve.decode.effects import AbandonFetch, Fetch, Fetched, FetchFailed, Key
from splitserve.decode.jobs import DecodeJobs
from splitserve.engine import door
from splitserve.protocol.effects import Publish
from splitserve.protocol.handle import GroupBlocks
from splitserve.protocol.messages import Accepted, Cancel, FinAck, Message, Refused, Resume, ResumeRow, TokenFrame
from splitserve.protocol.states import FailReason, FinishReason
from splitserve.worker.effects import ToEngine
from support.worker_cores import (
    BLOCK,
    PROMPT,
    SUBJECTS,
    Driver,
    amend,
    decode_job,
    handle,
    identity,
    kv_ready,
    reserved,
    source,
)

TOMBSTONE_S = 60.0 - 16.0  # time passes in strides
SLOTS = {"a": 0, "b": 1, "c": 2}

rids = st.sampled_from("abc")
attempts = st.integers(1, 4)


class DecodeMachine(RuleBasedStateMachine):
    """`engine` has what the engine was told to have: "await", "loaded" or "local"; `copying` the fetches under way.

    Every prefill attempt has the number of the decode attempt that awaits it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.core = DecodeJobs(identity(blocks=20), SUBJECTS)
        self.driver = Driver(self.core)
        self.engine: dict[Key, str] = {}
        self.copying: set[Key] = set()
        self.over: dict[Key, float] = {}  # when it ended: for a minute it must not run again
        self.answers: dict[Key, Message | None] = {}
        self.tokens: dict[Key, int] = {}

    def _obey(self, commands: Iterable[object]) -> None:
        for command in commands:
            match command:
                case ToEngine():
                    self._engine_told(command.command)
                case Fetch():
                    assert command.key not in self.copying
                    assert self.engine[command.key] == "await"
                    self.copying.add(command.key)
                case AbandonFetch():
                    assert command.key in self.copying
                    self.over[command.key] = self.driver.now
                case Publish(message=TokenFrame() as frame):
                    assert all(row.slot in SLOTS.values() for row in frame.rows())
                case _:
                    pass

    def _engine_told(self, command: door.Command) -> None:
        assert isinstance(command.key, tuple)
        key: Key = command.key
        match command:
            case door.Add():
                ended = [at for over, at in self.over.items() if over[0] == key[0] and over[1] >= key[1]]
                assert all(self.driver.now - at >= TOMBSTONE_S for at in ended), f"{key} is over and runs again"
                assert not [other for other in self.engine if other[0] == key[0] and other not in self.copying]
                self.engine[key] = "local" if command.mode is door.Mode.LOCAL else "await"
                self.tokens[key] = 0
            case door.Loaded():
                assert self.engine[key] == "await"
                assert key not in self.copying
                self.engine[key] = "loaded"
                self.tokens[key] += len(command.first_ids)
            case door.Abort(sequence=int()):
                pass  # of the only one: the job's own end follows
            case _:
                assert key not in self.copying, f"{key}: its blocks are freed under the copy"
                del self.engine[key]
                self.over[key] = self.driver.now

    def _answered(self, key: Key, was: str | None, answer: Message | None) -> None:
        self._obey(self.driver.commands)
        assert isinstance(answer, Accepted | Refused)
        if was is not None and key not in self.over:
            assert answer == self.answers[key]
        self.answers[key] = answer

    @rule(rid=rids, da=attempts, local=st.booleans())
    def asked(self, rid: str, da: int, local: bool) -> None:
        was = self.engine.get((rid, da))
        job = decode_job(rid, da, pa=da, slot=SLOTS[rid], source=None if local else source())
        self._answered((rid, da), was, self.driver.say(job))

    @rule(rid=rids, da=attempts, local=st.booleans())
    def amended(self, rid: str, da: int, local: bool) -> None:
        was = self.engine.get((rid, da))
        self._answered((rid, da), was, self.driver.say(amend(rid, da, pa=da, source=None if local else source())))

    @rule(rid=rids, da=attempts)
    def cancelled(self, rid: str, da: int) -> None:
        self.driver.say(Cancel(rid, 7, 0, da, "test"))
        self._obey(self.driver.commands)
        self.over[rid, da] = self.driver.now
        assert not [key for key in self.engine if key[0] == rid and key[1] <= da and key not in self.copying]

    @rule(rid=rids, pa=attempts)
    def kv_comes(self, rid: str, pa: int) -> None:
        self.driver.say(kv_ready(rid, pa))
        self._obey(self.driver.commands)

    @rule(rid=rids, pa=attempts, blocks=st.sampled_from(((50,), (50, 51), (51,))))
    def kv_comes_early(self, rid: str, pa: int, blocks: tuple[int, ...]) -> None:
        tokens = (blocks[-1] - 49) * BLOCK
        groups = (GroupBlocks(0, blocks, tuple(850 + block for block in blocks)),)
        part = handle(rid, pa, PROMPT[:tokens], groups=groups)
        self.driver.say(kv_ready(rid, handle=part, tokens_ready=tokens, final=False, first_ids=(), finishes=()))
        self._obey(self.driver.commands)

    def _in_state(self, *states: str) -> list[Key]:
        return sorted(key for key, state in self.engine.items() if state in states)

    @precondition(lambda self: self._in_state("await"))
    @rule(data=st.data(), there_is_room=st.booleans())
    def engine_answers(self, data: st.DataObject, there_is_room: bool) -> None:
        key = data.draw(st.sampled_from(self._in_state("await")))
        if there_is_room or key in self.copying:
            self._obey(self.driver.engine(reserved(*key)))
        else:
            self._leaves(key, door.Rejected(key, "no room"))

    @precondition(lambda self: self.copying)
    @rule(data=st.data(), reason=st.sampled_from((None, FailReason.FENCED, FailReason.UNREACHABLE)))
    def fetch_ends(self, data: st.DataObject, reason: FailReason | None) -> None:
        key = data.draw(st.sampled_from(sorted(self.copying)))
        self.copying.discard(key)
        ended = Fetched(key, 12, 3, "shm", 0.1) if reason is None else FetchFailed(key, reason, "test")
        self._obey(self.driver.event(ended))

    @precondition(lambda self: self._in_state("local", "loaded"))
    @rule(data=st.data(), finish=st.sampled_from(FinishReason), preempted=st.booleans())
    def engine_steps(self, data: st.DataObject, finish: FinishReason, preempted: bool) -> None:
        key = data.draw(st.sampled_from(self._in_state("local", "loaded")))
        if preempted:
            self._leaves(key, door.Preempted(key))
        elif finish is FinishReason.ERROR:
            self._leaves(key, door.Failed(key, "raised"))
        else:
            event = door.TokenEvent(key, 0, self.tokens[key], (9,), finish)
            self.tokens[key] += 1
            if finish is FinishReason.RUNNING:
                self._obey(self.driver.engine(event))
            else:
                self._leaves(key, event, door.Gone(key))

    def _leaves(self, key: Key, *events: door.Event) -> None:
        """The engine lets go of a job by itself."""
        del self.engine[key]
        self._obey(self.driver.engine(*events))

    @rule(rid=rids)
    def acknowledged(self, rid: str) -> None:
        self.driver.say(FinAck("r1", 7, (SLOTS[rid],)))
        self._obey(self.driver.commands)

    @rule(rid=rids, da=attempts, index=st.integers(0, 3))
    def resumed(self, rid: str, da: int, index: int) -> None:
        self.driver.say(Resume("r1", 7, (ResumeRow(rid, da, SLOTS[rid], index),)))
        self._obey(self.driver.commands)

    @rule(seconds=st.sampled_from((0.5, 3.0, 16.0)), heard=st.booleans())
    def time_passes(self, seconds: float, heard: bool) -> None:
        self._obey(self.driver.beats(seconds, *(["r1"] if heard else [])))

    @invariant()
    def work_has_a_timer(self) -> None:
        assert not set(self.engine) - self.copying or self.core.wake_at() is not None

    def teardown(self) -> None:
        for key in sorted(self.copying):
            self.copying.discard(key)
            self._obey(self.driver.event(FetchFailed(key, FailReason.UNREACHABLE, "the end")))
        self._obey(self.driver.after(700.0))
        assert not self.engine
        assert self.core.idle
        assert self.core.promised_blocks == 0


TestDecodeJobs = DecodeMachine.TestCase
TestDecodeJobs.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
