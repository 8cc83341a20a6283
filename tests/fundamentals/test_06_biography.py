"""**One request's biography.** Three cores and two engines, joined by hand: the test is the bus and the clock. A message
goes where its subject says, an answer to who asked. This is all that `splitserve serve` does, but for NATS between them,
threads under the engines, and a data plane that copies the blocks.

The order of `told` is the protocol (docs/protocol.md): decode is reserved before prefill is asked, so that every handle
is born with a place to go; the first token reaches the client before decode has the KV.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from splitserve.config import RoutingSettings
from splitserve.decode.effects import Fetch, Fetched
from splitserve.decode.jobs import DecodeJobs
from splitserve.prefill.jobs import PrefillJobs
from splitserve.protocol.effects import Answer, Answered, Ask, Publish, Received, Tick
from splitserve.protocol.params import SamplingParams
from splitserve.protocol.states import RequestState
from splitserve.router.core import RouterCore
from splitserve.router.effects import Deliver, Leave, Save, Submit
from splitserve.router.generation import Done, Submission, Tokens
from splitserve.worker.effects import EngineBatch, ToEngine
from support.engines import Bench
from support.toy_runner import reference
from support.worker_cores import FINGERPRINT, SUBJECTS, identity

PROMPT = tuple(range(11))
SEED, ANSWER = 5, 6


@dataclass
class Member:
    """A worker: its core, its engine, the events that wait for it."""

    core: PrefillJobs | DecodeJobs
    bench: Bench = field(default_factory=lambda: Bench(blocks=100, fingerprint=FINGERPRINT))


class Story:
    """Router, prefill worker `p`, decode worker `d`. `told` is every message between them, `heard` what the client got."""

    def __init__(self) -> None:
        settings = RoutingSettings.model_validate({"split": "always"})
        self.router = RouterCore(
            router="life", name="router", incarnation=1, subjects=SUBJECTS, settings=settings, rules=None
        )
        self.workers = {
            "p": Member(PrefillJobs(identity("p"), SUBJECTS)),
            "d": Member(DecodeJobs(identity("d"), SUBJECTS)),
        }
        self.now = 0.0
        self.told: list[str] = []
        self.heard: list[int] = []
        self.states: list[RequestState] = []
        self.done: Done | None = None
        self._queue: deque[tuple[str, Any]] = deque()
        for beat in (self.router.beat(0), *(worker.core.beat(0) for worker in self.workers.values())):
            self._queue.append(("router", Received(beat)))

    def say(self, to: str, event: object) -> None:
        self._queue.append((to, event))

    def run(self, until: str = "") -> None:
        """Until all is quiet, or a message of this kind is on its way."""
        while self._queue or self._steps():
            while self._queue:
                name, event = self._queue.popleft()
                core = self.router if name == "router" else self.workers[name].core
                self._carry_out(name, core.handle(event, self.now))
                if until and until in self.told:
                    return

    def pass_time(self, seconds: float) -> None:
        """Everybody looks at the clock."""
        self.now += seconds
        for name in ("router", "p", "d"):
            self.say(name, Tick())
        self.run()

    def _steps(self) -> bool:
        """One step of each engine that has work."""
        for name, worker in self.workers.items():
            engine = worker.bench.engine
            for batch in (engine.answer(), engine.step() if engine.has_work else None):
                if batch is not None:
                    self.say(name, EngineBatch(batch))
        return bool(self._queue)

    def _carry_out(self, me: str, commands: Iterable[Any]) -> None:
        for command in commands:
            match command:
                case Publish(subject, message):
                    self._tell(subject, Received(message))
                case Ask(subject, message, _, tag):
                    self._tell(subject, Received(message, reply_to=(me, tag)))  # pyright: ignore[reportArgumentType]
                case Answer((who, tag), message):  # pyright: ignore[reportGeneralTypeIssues]
                    self.say(who, Answered(tag, message))
                case ToEngine(work):
                    self.workers[me].bench.engine.submit(work)
                case Fetch(key, handle, pairs):
                    source, target = (self.workers[name].bench.runner.toy.storage for name in (handle.owner, me))
                    for pair in pairs:
                        target.write(pair.local, source.read(pair.remote))
                    self.say(me, Fetched(key, bytes=0, blocks=len(pairs), transport="by hand", seconds=0.0))
                case Deliver(_, Tokens(_, _, ids)):
                    self.told.append(f"client: {len(ids)} token")
                    self.heard.extend(ids)
                case Deliver(_, Done() as done):
                    self.done = done
                case Save(record):
                    self.states.append(record.state)
                case _:
                    pass  # Finished, and hints that only real data planes need

    def _tell(self, subject: str, event: Received) -> None:
        who = subject.split(".")[3]
        name = "router" if who == "life" else who
        kind = type(event.message).__name__
        if kind != "Digest":
            self.told.append(f"{name}: {kind}")
        self.say(name, event)

    def submit(self) -> None:
        params = SamplingParams(max_tokens=ANSWER, ignore_eos=True)
        self.say("router", Submit(Submission("r", "toy", PROMPT, params, (SEED,), timeout_s=600)))

    @property
    def nothing_held(self) -> bool:
        used = [worker.bench.pool.stats.owned + worker.bench.pool.stats.filling for worker in self.workers.values()]
        return self.router.idle and all(worker.core.idle for worker in self.workers.values()) and used == [0, 0]


def test_a_request_is_reserved_prefilled_handed_over_decoded_and_ended() -> None:
    story = Story()
    story.submit()
    story.run()
    story.pass_time(0.3)  # a FinAck waits for others for 200 ms
    assert story.told == [
        "d: DecodeJob",
        "p: PrefillJob",
        "router: KvReady",
        "d: KvReady",
        "client: 1 token",
        "router: KvLoaded",
        "p: Release",
        *["router: TokenFrame", "client: 1 token"] * (ANSWER - 1),
        "d: FinAck",
    ]
    assert list(dict.fromkeys(story.states)) == [
        RequestState.QUEUED,
        RequestState.PREFILLING,
        RequestState.TRANSFERRING,
        RequestState.DECODING,
        RequestState.FINISHED,
    ]


def test_the_answer_is_the_one_that_a_single_process_would_have_given() -> None:
    story = Story()
    story.submit()
    story.run()
    assert story.heard == reference(PROMPT, seed=SEED, count=ANSWER)
    assert story.done is not None
    assert story.done.error is None


def test_decode_computes_nothing_of_the_prompt() -> None:
    story = Story()
    story.submit()
    story.run()
    computed = {name: worker.bench.runner.toy.computed_tokens for name, worker in story.workers.items()}
    assert computed == {"p": len(PROMPT), "d": ANSWER - 1}


def test_a_client_that_leaves_at_any_moment_frees_everything_everywhere() -> None:
    for moment in ("d: DecodeJob", "p: PrefillJob", "router: KvReady", "router: KvLoaded", "router: TokenFrame"):
        story = Story()
        story.submit()
        story.run(until=moment)
        story.say("router", Leave("r"))
        story.run()
        assert story.states[-1] is RequestState.CANCELLED, moment
        assert story.nothing_held, moment
