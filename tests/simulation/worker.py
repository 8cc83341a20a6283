"""Workers: a core, an engine that takes its time, and (decode) the fetches under way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simulation.inspection import blocks_add_up, what_is_loaded_is_what_the_final_handle_named
from simulation.invariants import require
from simulation.memory import Memory
from simulation.process import Process
from simulation.reference import EOS_IDS, MAX_MODEL_LEN, VARIANTS, VOCABULARY
from simulation.transfer import Transfer
from splitserve.decode.effects import AbandonFetch, Attach, Fetch
from splitserve.decode.jobs import DecodeJobs
from splitserve.engine import door
from splitserve.engine.batch import StepBatch, StepOutput
from splitserve.engine.engine import Engine
from splitserve.engine.execution import Execution, execute
from splitserve.engine.sequence import EngineConfig
from splitserve.kv.prefix import PrefixIndex
from splitserve.prefill.jobs import PrefillJobs
from splitserve.protocol.effects import Publish, Received
from splitserve.protocol.handle import KvAddress
from splitserve.protocol.messages import Beat, Cancel, KvReady, Message
from splitserve.protocol.states import Role
from splitserve.worker.effects import EngineBatch, Identity, ToEngine
from splitserve.worker.rules import Limits
from support.toy_runner import ToyRunner

if TYPE_CHECKING:
    from simulation.world import World

BEAT_S = 0.5
HOP_S = 0.0001  # from the loop to the engine's thread
FINGERPRINT = "toy"
MODEL = "toy"


class FallibleRunner(ToyRunner):
    """Raises as often as `failures` says."""

    failures = 0

    def end(self, batch: StepBatch) -> StepOutput:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("a step that was told to fail")
        return super().end(batch)


class Worker(Process):
    """What both roles share."""

    def __init__(self, world: World, name: str, role: Role) -> None:
        super().__init__(world, name)
        cluster = world.cluster
        self.role = role
        self.rules = world.worker_rules
        self.limits = Limits(lease_ttl_s=cluster.lease_ttl_s)
        blocks = cluster.prefill_blocks if role is Role.PREFILL else cluster.decode_blocks
        chunk = cluster.chunk_tokens if role is Role.PREFILL else cluster.decode_chunk_tokens
        incarnation = world.rng.getrandbits(63)
        self.identity = Identity(
            name=name,
            incarnation=incarnation,
            model=MODEL,
            fingerprint=FINGERPRINT,
            fingerprint_factors=(("model", MODEL),),
            block_tokens=cluster.block_tokens,
            total_blocks=blocks,
            max_model_len=MAX_MODEL_LEN,
            chunk_tokens=chunk,
            bytes_per_token=1,
            addresses=(KvAddress(cluster.transport, f"{name}@{incarnation}", "host"),),
        )
        self.memory = Memory(blocks, cluster.block_tokens)
        self.runner = FallibleRunner(self.memory, VOCABULARY, self._variant if cluster.free_variant else lambda: 0)
        config = EngineConfig(
            cluster.block_tokens, cluster.max_num_seqs, chunk, MAX_MODEL_LEN, EOS_IDS, fingerprint=FINGERPRINT
        )
        pool = self.memory.pool
        self.engine = Engine(config, pool, PrefixIndex(pool), self.runner, lambda: self.now)
        self.wedged_s = 0.0
        self._step: StepBatch | None = None
        self._step_began = 0.0
        self._kicked = False
        self._cancelled: dict[str, int] = {}  # rid -> highest attempt whose Cancel was handled
        self.acts[ToEngine] = self._to_engine

    @property
    def step_age_s(self) -> float:
        """How long the step under way has been running."""
        return self.now - self._step_began if self._step is not None else 0.0

    @property
    def idle(self) -> bool:
        """May leave."""
        raise NotImplementedError

    @property
    def promised_blocks(self) -> int:
        raise NotImplementedError

    def _variant(self) -> int:
        return self.world.rng.randrange(VARIANTS)

    def start(self) -> None:
        subjects = self.world.subjects
        self.subscribe(subjects.worker_in(self.name))
        self.subscribe_beats(subjects.all_beats)
        self.later(self.world.rng.random() * 0.05, self._beat)

    # --- beats ---

    def beat(self, beat: Message, _reply_to: str | None) -> None:
        """Those of other workers only bring names for a mismatch, of which there is none here."""
        if isinstance(beat, Beat) and (beat.role == Role.ROUTER or beat.name == self.name):
            self.message(beat, None)

    def _beat(self) -> None:
        subject = self.world.subjects.beat(self.role, self.name)
        self.world.bus.publish(self.beats, subject, self.beat_of(int(self.step_age_s * 1000)))
        self.later(BEAT_S, self._beat)

    def beat_of(self, step_age_ms: int) -> Beat:
        raise NotImplementedError

    # --- the engine's thread ---

    def _to_engine(self, command: ToEngine) -> None:
        if isinstance(command.command, door.Add):
            self._no_work_after_its_cancel(command.command.key)
        self.engine.submit(command.command)
        self._kick()

    def _no_work_after_its_cancel(self, key: Any) -> None:
        """Invariant 8."""
        rid, attempt = key
        cancelled = self._cancelled.get(rid, -1)
        text = f"{self.name} starts attempt {attempt} of {rid}, cancelled up to {cancelled}"
        require(attempt > cancelled, "no_work_after_its_cancel", text)
        self.world.taken(self, rid)

    def _kick(self) -> None:
        if self._step is None and not self._kicked:
            self._kicked = True
            self.later(HOP_S, self._round)

    def _round(self) -> None:
        """Commands first, then a step, as the host's thread does."""
        self._kicked = False
        if self._step is not None:
            return
        self._report(self.engine.answer())
        if not self.engine.has_work:
            return
        self._step = self.engine.begin()
        if self._step is None:
            self._report(self.engine.answer())
            return
        self._report(self.engine.known())
        self.runner.begin(self._step)
        self._step_began = self.now
        least, most = self.world.cluster.step_s
        seconds = least + (most - least) * self.world.rng.random() + self.wedged_s
        self.wedged_s = 0.0
        self.later(seconds, self._step_over)

    def _step_over(self) -> None:
        step, self._step = self._step, None
        if step is None:
            return
        execution = execute(self.runner, step) if self.runner.failures else Execution(self.runner.end(step))
        self._report(self.engine.finish(execution))
        self._round()

    def _report(self, batch: door.Batch | None) -> None:
        if batch is None:
            return
        blocks_add_up(self)
        self._promises_fit()
        for event in batch.events:
            if isinstance(event, door.Prefilled | door.Progress):
                for group in event.groups:
                    self.memory.seal(group.blocks, group.generations)
        self.handle(EngineBatch(batch))

    def _promises_fit(self) -> None:
        """Invariant 10: what is held and promised has room. A long answer may outgrow its promise: it gives way."""
        promised, total = self.promised_blocks, self.memory.pool.total
        fits = promised <= total or self.world.schedule.profile == "long"
        require(fits, "promises_fit", f"{self.name} promised {promised} blocks of {total}")

    def handled(self, event: Any, commands: list[Any]) -> None:
        if isinstance(event, Received) and isinstance(event.message, Cancel):
            cancel = event.message
            if cancel.incarnation == self.identity.incarnation:
                attempt = cancel.pa if self.role is Role.PREFILL else cancel.da
                self._cancelled[cancel.rid] = max(self._cancelled.get(cancel.rid, -1), attempt)
        for command in commands:
            if isinstance(command, Publish) and isinstance(command.message, KvReady) and command.message.final:
                self.world.one_first_token(command.message)


class PrefillWorker(Worker):
    """Reads prompts, holds blocks under leases."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name, Role.PREFILL)
        self.core = self.jobs = PrefillJobs(
            self.identity, world.subjects, self.limits, self.rules, new_token=self._token
        )

    def _token(self) -> str:
        return f"{self.world.rng.getrandbits(128):032x}"

    def start(self) -> None:
        super().start()
        self.subscribe(self.world.subjects.worker_lease(self.name))

    @property
    def idle(self) -> bool:
        return self.jobs.idle

    @property
    def promised_blocks(self) -> int:
        return self.jobs.promised_blocks

    def beat_of(self, step_age_ms: int) -> Beat:
        return self.jobs.beat(self.now, step_age_ms)


class DecodeWorker(Worker):
    """Fetches prompts, writes answers. `mapped`: the owners' memory that it has attached, which outlives them."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name, Role.DECODE)
        self.core = self.jobs = DecodeJobs(self.identity, world.subjects, self.limits, self.rules)
        self.mapped: dict[tuple[str, int], Memory] = {}
        self.transfers: dict[Any, Transfer] = {}
        self.acts[Attach] = self._attach
        self.acts[Fetch] = self._fetch
        self.acts[AbandonFetch] = self._abandon

    def start(self) -> None:
        super().start()
        self.subscribe(self.world.subjects.worker_kv(self.name))

    @property
    def idle(self) -> bool:
        return self.jobs.idle

    @property
    def promised_blocks(self) -> int:
        return self.jobs.promised_blocks

    def beat_of(self, step_age_ms: int) -> Beat:
        return self.jobs.beat(self.now, step_age_ms)

    def _attach(self, command: Attach) -> None:
        self._map(command.source.worker, command.source.incarnation)

    def _map(self, name: str, incarnation: int) -> PrefillWorker | None:
        """The owner if it lives in that life; its memory is mapped from then on."""
        owner = self.world.processes.get(name)
        if not isinstance(owner, PrefillWorker) or not owner.alive or owner.identity.incarnation != incarnation:
            return None
        self.mapped[name, incarnation] = owner.memory
        return owner

    def handled(self, event: Any, commands: list[Any]) -> None:
        super().handled(event, commands)
        for command in commands:
            if isinstance(command, ToEngine) and isinstance(command.command, door.Loaded):
                what_is_loaded_is_what_the_final_handle_named(self, command.command.key)

    def _fetch(self, command: Fetch) -> None:
        handle = command.handle
        require(command.key not in self.transfers, "one_fetch_a_job", f"{command.key} is fetched twice")
        owner = self._map(handle.owner, handle.incarnation)
        memory = self.mapped.get((handle.owner, handle.incarnation))
        two_sided = self.world.cluster.transport == "tcp"
        if two_sided and owner is None:
            memory = None
        transfer = Transfer(self, command, owner if two_sided else None, memory)
        self.transfers[command.key] = transfer
        transfer.start()

    def _abandon(self, command: AbandonFetch) -> None:
        if (transfer := self.transfers.get(command.key)) is not None:
            transfer.abandon()

    def transfer_over(self, transfer: Transfer) -> None:
        del self.transfers[transfer.fetch.key]

    def die(self) -> None:
        super().die()
        for transfer in self.transfers.values():
            transfer.reader_died()
