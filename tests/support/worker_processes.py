"""Real worker processes over a tiny model, and a test that plays their router on a real bus."""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client.parser import text_string_to_metric_families

from splitserve.bus.bus import Bus
from splitserve.protocol.handle import KvSource
from splitserve.protocol.messages import Beat, DecodeJob, Message, PrefillJob, TokenFrame
from splitserve.protocol.params import SamplingParams
from splitserve.protocol.states import Role
from splitserve.protocol.subjects import Subjects
from support.processes import environment
from support.waiting import until

T = TypeVar("T")
START_S = 60.0


def save_tiny_model(folder: Path) -> Path:
    """A random two-layer Llama as a model folder; its tokenizer is not read by workers, but has to be there."""
    from support.tiny_models import ADMITTED, save_model  # late: it loads torch

    save_model(ADMITTED["llama"](), folder)
    (folder / "tokenizer.json").write_text(json.dumps({}))
    return folder


class WorkerProcess:
    """One `splitserve prefill` or `splitserve decode`."""

    def __init__(self, role: Role, name: str, nats: str, model: Path, *flags: str, **env: str) -> None:
        self.role = role
        self.name = name
        command = [sys.executable, "-m", "splitserve", role, "--name", name, "--nats", nats, "--model", str(model)]
        command += ["--dtype", "float32", "--threads", "1", "--kv-cache-memory-bytes", "1MiB", *flags]
        self.process = subprocess.Popen(
            command, env=environment(**env), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    async def ended(self, within_s: float = 20.0) -> tuple[int, str]:
        """Its exit code and what it said on standard error; it is killed if it does not end in time."""
        try:
            _, said = await asyncio.to_thread(self.process.communicate, timeout=within_s)
        finally:
            self.kill()
        return self.process.returncode, said

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        self.process.kill()
        self.process.communicate()


class RouterInTest:
    """Sends what a router sends, and keeps what it hears."""

    def __init__(self, bus: Bus, name: str) -> None:
        self.bus = bus
        self.name = name
        self.subjects = Subjects()
        self.beats: dict[str, Beat] = {}
        self.beats_heard: Counter[str] = Counter()
        self.heard: list[Message] = []
        self._beating: asyncio.Task[None] | None = None

    @classmethod
    @asynccontextmanager
    async def on(cls, nats: str) -> AsyncGenerator[RouterInTest]:
        """A new router life; its name is new too, as the protocol wants it."""
        name = f"r-{secrets.token_hex(4)}"
        bus = await Bus.connect(nats, name=name, role="router", connect_timeout_s=10)
        router = cls(bus, name)
        await bus.subscribe(router.subjects.all_beats, router._on_beat)
        await bus.subscribe(router.subjects.router_events(name), lambda message, _: router.heard.append(message))
        router._beating = asyncio.create_task(router._beat())
        try:
            yield router
        finally:
            router.silence()
            await bus.close()

    def silence(self) -> None:
        """Send no more beats."""
        if self._beating is not None:
            self._beating.cancel()

    async def _beat(self) -> None:
        while True:
            await self.bus.publish(self.subjects.beat("router", "r"), Beat("r", "router", 1, life=self.name))
            await asyncio.sleep(0.5)

    def _on_beat(self, message: Message, _: str | None) -> None:
        if isinstance(message, Beat):
            self.beats[message.name] = message
            self.beats_heard[message.name] += 1

    async def ready(self, worker: WorkerProcess) -> Beat:
        """Its beat; fails at once when its process ends instead."""

        def come() -> bool:
            if worker.process.poll() is not None:
                raise RuntimeError(f"{worker.name} ended: {worker.process.communicate()[1]}")
            return worker.name in self.beats

        await until(come, f"the first beat of {worker.name}", START_S)
        return self.beats[worker.name]

    async def beat_with(self, worker: str, where: Callable[[Beat], bool], what: str, within_s: float = 10.0) -> None:
        """Wait for a beat that was made from now on and for which `where` holds."""
        made = self.beats_heard[worker] + 2  # the next one may have been under way
        await until(lambda: self.beats_heard[worker] >= made and where(self.beats[worker]), what, within_s)

    async def ask(self, worker: str, message: Message) -> Message:
        return await self.bus.request(self.subjects.worker_in(worker), message, 2.0)

    def all(self, kind: type[T]) -> list[T]:
        return [message for message in self.heard if isinstance(message, kind)]

    async def first(self, kind: type[T], where: Callable[[T], bool] = lambda message: True) -> T:
        """The first message of a kind that was heard, or will be."""
        await until(lambda: any(where(m) for m in self.all(kind)), f"a {kind.__name__}")
        return next(message for message in self.all(kind) if where(message))

    def tokens(self, slot: int, da: int) -> list[int]:
        """Ids of a slot from its frames; each index once."""
        found: dict[int, int] = {}
        for frame in self.all(TokenFrame):
            for row in frame.rows():
                if (row.slot, row.da) == (slot, da):
                    found.update(enumerate(row.ids, row.first_index))
        return [found[index] for index in sorted(found)]

    def finished(self, slot: int) -> bool:
        return any(row.finish for frame in self.all(TokenFrame) for row in frame.rows() if row.slot == slot)

    def decode_job(self, worker: str, rid: str, slot: int, ids: tuple[int, ...], **changes: Any) -> DecodeJob:
        beat = self.beats[worker]
        fields: dict[str, Any] = {
            "da": 1,
            "pa": 1,
            "source": None,
            "outputs": ((),),
            "params": SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True),
            "seeds": (1,),
            "ttl_s": 60.0,
        }
        return DecodeJob(
            rid=rid, router=self.name, incarnation=beat.incarnation, slot=slot, ids=ids,
            fingerprint=beat.fingerprint, **(fields | changes),
        )  # fmt: skip

    def prefill_job(self, worker: str, decode: str, rid: str, ids: tuple[int, ...], **changes: Any) -> PrefillJob:
        beat = self.beats[worker]
        fields: dict[str, Any] = {
            "pa": 1,
            "prompt_len": len(ids),
            "params": SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True),
            "seeds": (1,),
            "notify": (self.subjects.router_events(self.name), self.subjects.worker_kv(decode)),
            "ttl_s": 60.0,
        }
        return PrefillJob(
            rid=rid, router=self.name, incarnation=beat.incarnation, ids=ids, fingerprint=beat.fingerprint,
            **(fields | changes),
        )  # fmt: skip

    def source(self, worker: str) -> KvSource:
        beat = self.beats[worker]
        return KvSource(worker, beat.incarnation, beat.addresses)

    async def metrics(self, worker: str) -> dict[str, float]:
        """Samples without labels beyond the constant ones, by name; labelled ones as name{label}."""
        page = await asyncio.to_thread(lambda: urllib.request.urlopen(self.beats[worker].metrics_url).read().decode())
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                labels = [v for k, v in sample.labels.items() if k not in ("model_name", "engine")]
                found[f"{sample.name}{{{','.join(labels)}}}" if labels else sample.name] = sample.value
        return found
