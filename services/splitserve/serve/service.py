"""`splitserve serve`: the whole cluster on one machine, from one command, and nothing left of it afterwards."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from pathlib import Path

from splitserve.bus.bus import Bus
from splitserve.config import ServeProcessSettings
from splitserve.errors import ModelUnavailable
from splitserve.model.resolve import served_names
from splitserve.protocol.messages import Beat, Message
from splitserve.protocol.subjects import Subjects, subject_token
from splitserve.runtime.addresses import address_of, write_address
from splitserve.runtime.folder import run_folder
from splitserve.runtime.http import bind, port_of
from splitserve.runtime.logs import set_up_logs
from splitserve.runtime.process import Signals
from splitserve.serve import cores, plan
from splitserve.serve.child import Spec, python
from splitserve.serve.embedded import Server, nats_server, redis_server
from splitserve.serve.policy import Rules
from splitserve.serve.probe import READY_ANSWER, READY_REQUEST, answers
from splitserve.serve.progress import Progress, progress_on
from splitserve.serve.supervisor import Probe, Supervisor, run_once
from splitserve.telemetry.tracing import check_tracing
from splitserve.worker.lending import make_page

log = logging.getLogger("splitserve.serve")


async def run(settings: ServeProcessSettings, signals: Signals) -> None:
    """Start everything, say how to use it, keep it alive until a stop signal. Raises StartupError."""
    set_up_logs(settings.log, "serve")
    check_tracing(settings.tracing)
    port = _free_port(settings.http.host, settings.http.port)
    with run_folder() as folder:
        await Serve(settings, folder, port, progress_on(sys.stdout)).run(signals)


def _free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. Raises PortTaken before anything was started."""
    sock = bind(host, port)
    try:
        return port_of(sock)
    finally:
        sock.close()


class Serve:
    """One run of `splitserve serve`: the start in order, then watching, then the stop in order."""

    def __init__(self, settings: ServeProcessSettings, folder: Path, port: int, progress: Progress) -> None:
        self._settings = settings
        self._folder = folder
        self._port = port
        self._progress = progress
        self._supervisor = Supervisor(Rules(start_s=settings.serve.start_timeout), self._on_ready)
        self._bus: Bus | None = None
        self._began = time.monotonic()
        self._stop_order: list[list[str]] = []
        workers = settings.serve.prefill + settings.serve.decode
        self._shares = cores.share_cores(cores.cores(), cores.cpu_limit(), workers, settings.engine.threads)
        self._front = plan.front_cpus(settings, self._shares)

    async def run(self, signals: Signals) -> None:
        """Until a stop signal; raises the StartupError of a start that failed or a child that was given up."""
        stop = asyncio.create_task(signals.stop(), name="stop-signal")
        tasks = {stop, asyncio.create_task(self._supervisor.keep()), asyncio.create_task(self._start())}
        pending = tasks
        try:
            while not stop.done():
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            await _cancelled(tasks)
            await self._stop(signals)
        finally:
            await _cancelled(tasks)
            self._progress.close()
            await self._listen_no_more()
            await self._supervisor.kill_all()

    async def _start(self) -> None:
        settings = self._settings
        if plan.is_open(settings.http.host) and not settings.http.api_key:
            self._progress.say(f"warning: --host {settings.http.host} is open to others, and there is no --api-key")
        nats, redis = await self._servers()
        folder = await self._model()
        given = self._given(folder, nats, redis)
        await self._listen(address_of(nats, "--nats"))
        workers = plan.worker_specs(settings, given, self._shares)
        router = plan.router_spec(settings, given, self._front)
        self._stop_order[:0] = [[router.name], [spec.name for spec in workers]]
        for spec in workers:
            self._progress.doing(spec.name, f"{spec.name} loads")
            self._supervisor.add(spec, _echo)
        self._progress.doing(router.name, f"{router.name} starts")
        self._supervisor.add(router, _echo, self._router_is_ready)
        await self._supervisor.ready([router.name, *(spec.name for spec in workers)])
        self._progress.close()
        self._say_how_to_use(given)

    async def _servers(self) -> tuple[str, str]:
        """NATS and Redis as flags take them: those given, else our own, started and answering."""
        cluster = self._settings.cluster
        own: list[Server] = []
        for address, flag, make in ((cluster.nats, "--nats", nats_server), (cluster.redis, "--redis", redis_server)):
            if address:
                address_of(address, flag)
            else:
                own.append(make(self._folder))
        for server in own:
            self._progress.doing(server.name, f"{server.name} starts")
            write_address(self._folder / server.name, server.url)
            self._supervisor.add(Spec(server.name, server.command, cpus=self._front), _nowhere, _probe_of(server))
        names = [server.name for server in own]
        self._stop_order.append(names)
        await self._supervisor.ready(names)
        return cluster.nats or f"@{self._folder / 'nats'}", cluster.redis or f"@{self._folder / 'redis'}"

    async def _model(self) -> Path:
        """Resolve the model once for all, in a child that can be killed."""
        model = self._settings.model
        found: list[Path] = []
        name = served_names(model)[0]
        self._progress.doing("model", f"looking for {name}")

        def line(text: str) -> None:
            kind, _, rest = text.partition(" ")
            if kind == "progress":
                self._progress.doing("model", rest)
            elif kind == "folder":
                found.append(Path(rest))

        env = {"MODEL": model.model, "REVISION": model.revision, "CACHE_DIR": model.cache_dir}
        command = python("-m", "splitserve.model.resolve")
        await run_once(Spec("model", command, {f"SPLITSERVE_{key}": value for key, value in env.items()}), line)
        if not found:
            raise ModelUnavailable(f"{name}: {' '.join(command)} named no folder")
        self._progress.done("model", f"{name} is in {found[0]}")
        return found[0]

    def _given(self, folder: Path, nats: str, redis: str) -> plan.Given:
        settings = self._settings
        workers = settings.serve.prefill + settings.serve.decode
        pool = settings.engine.kv_cache_memory_bytes
        on_gpu = settings.engine.device == "cuda" or (settings.engine.device == "auto" and cores.has_gpu())
        if on_gpu:
            self._progress.say(
                f"each of {workers} workers gets {settings.engine.gpu_memory_utilization / workers:.0%} of the GPU"
            )
        else:
            weights = cores.weight_bytes(folder, settings.model.dtype)
            pool = cores.share_memory(cores.free_memory(), weights, workers, pool).pool
        log_format = settings.log.log_format
        if log_format == "auto":
            log_format = "text" if sys.stderr.isatty() else "json"
        sockets = self._folder / "kv"
        sockets.mkdir(mode=0o700)
        page = (
            self._folder / "lending" if settings.serve.lend_cores and not on_gpu and sys.platform == "linux" else None
        )
        if page:
            make_page(page, workers)
        host = subject_token(socket.gethostname())
        return plan.Given(
            folder=folder,
            served_name=",".join(served_names(settings.model)),
            nats=nats,
            redis=redis,
            sockets=sockets,
            port=self._port,
            pool_bytes=pool,
            log_format=log_format,
            page=page,
            suffix=f"{host}-{os.getpid()}-" if settings.cluster.nats else "",
        )

    async def _listen(self, nats_url: str) -> None:
        """Hear the workers' beats: ready, and how old the step under way is."""
        cluster = self._settings.cluster
        self._bus = await Bus.connect(nats_url, name="serve", role="serve", connect_timeout_s=cluster.connect_timeout)
        await self._bus.subscribe(Subjects(subject_token(cluster.cluster)).all_beats, self._on_message)

    async def _listen_no_more(self) -> None:
        if self._bus:
            await self._bus.close()
            self._bus = None

    def _on_message(self, message: Message, _: str | None) -> None:
        if isinstance(message, Beat):
            self._supervisor.heard(message)

    async def _router_is_ready(self) -> bool:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._settings.http.host, self._settings.http.host)
        return await answers(host, self._port, READY_REQUEST, READY_ANSWER)

    def _on_ready(self, name: str) -> None:
        log.debug("child ready", extra={"child": name})
        self._progress.done(name, f"{name} is ready")

    def _say_how_to_use(self, given: plan.Given) -> None:
        http = self._settings.http
        url = plan.url_of(http.host, self._port)
        model = given.served_name.partition(",")[0]
        key = http.api_key.partition(",")[0]
        for text in (
            "",
            f"{model} answers at {url}/v1, ready in {time.monotonic() - self._began:.1f} s. Ctrl-C stops everything. Try:",
            "",
            plan.curl_line(url, model, key),
            "",
            f"One more worker, from another terminal: {plan.join_line(self._settings, given)}",
        ):
            self._progress.say(text)

    async def _stop(self, signals: Signals) -> None:
        self._progress.close()
        await self._listen_no_more()
        self._progress.say("stopping: running requests may finish (once more: at once)")
        at_once = asyncio.Event()

        async def hurry() -> None:
            await signals.stop_now()
            at_once.set()

        hurrying = asyncio.create_task(hurry(), name="hurry")
        try:
            await self._supervisor.stop(self._stop_order, self._settings.worker.drain_timeout, at_once)
        finally:
            await _cancelled({hurrying})
        self._progress.say("stopped")


async def _cancelled(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _echo(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _nowhere(_: str) -> None:
    """Servers' own logs: kept for their last words only."""


def _probe_of(server: Server) -> Probe:
    async def probe() -> bool:
        return await answers("127.0.0.1", server.port, server.hello, server.expect)

    return probe
