"""The router process: what it owns, opened in order and closed in reverse."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
from collections.abc import Mapping
from contextlib import AsyncExitStack

from splitserve.config import RouterSettings
from splitserve.errors import ConfigError
from splitserve.model.facts import ModelFacts
from splitserve.model.resolve import resolve, served_names
from splitserve.model.tokenizer import Tokenizer
from splitserve.protocol.states import Role
from splitserve.protocol.subjects import Subjects, subject_token
from splitserve.router.app import create_app, metrics_app
from splitserve.router.core import RouterCore
from splitserve.router.dispatcher import Dispatcher, ended
from splitserve.router.fleet_page import FleetPage
from splitserve.router.gauges import Gauges
from splitserve.router.metrics import RouterMetrics
from splitserve.router.observers import Observers
from splitserve.router.parts import FLEET_PAGE, ROUTER_PAGE, RouterParts
from splitserve.router.protocol import RouterProtocol
from splitserve.router.readiness import Readiness
from splitserve.router.records import Record, live, lost, shown
from splitserve.router.status.source import StatusSource
from splitserve.runtime.addresses import address_of
from splitserve.runtime.http import bind, port_of, serving
from splitserve.runtime.identity import found_at, name_of, url_of
from splitserve.runtime.lag import watch_lag
from splitserve.runtime.logs import set_up_logs
from splitserve.runtime.process import Signals
from splitserve.store.store import Store
from splitserve.telemetry.tracing import Tracer, open_tracer

log = logging.getLogger("splitserve.router")

_GARBAGE = 20_000  # new objects before the youngest generation is looked through


async def run(settings: RouterSettings, signals: Signals) -> None:
    """Serve until a stop signal. Raises StartupError."""
    name = name_of(settings.worker.name, Role.ROUTER)
    set_up_logs(settings.log, name)
    tracer = open_tracer(settings.tracing, "splitserve-router", name, settings.cluster.cluster)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(tracer.close)
        sock = bind(settings.http.host, settings.http.port)
        stack.callback(sock.close)
        metrics_sock = bind(settings.worker.metrics_host, settings.worker.metrics_port)
        stack.callback(metrics_sock.close)
        nats = address_of(settings.cluster.nats, "--nats")
        host = found_at(settings.worker.metrics_host, settings.worker, nats)
        metrics_url = url_of(host, port_of(metrics_sock), ROUTER_PAGE)
        tokenizer, facts = await asyncio.to_thread(_read_model, settings)
        router = await _Router.open(settings, name, metrics_url, facts, tracer, stack)
        readiness = router.readiness(tokenizer)
        parts = router.parts(tokenizer, facts, readiness)
        app = create_app(parts)
        await stack.enter_async_context(serving(metrics_app(app.state.api), metrics_sock))
        await stack.enter_async_context(
            serving(app, sock, protocol=RouterProtocol, grace_s=int(settings.worker.drain_timeout))
        )
        if parts.status is not None:
            stack.callback(parts.status.close)
        for work in (readiness.prove(), router.fleet_page.run(), router.watch_lag()):
            stack.push_async_callback(ended, asyncio.create_task(work, name="router"))
        gc.collect()
        gc.freeze()  # what is there now stays: looking through it stopped the loop, and all streams, for 30 ms a time
        gc.set_threshold(_GARBAGE)  # requests leave few cycles, and looking for them was a twenty-fifth of all work
        log.info("listening", extra={"host": settings.http.host, "port": settings.http.port, "metrics": metrics_url})
        await signals.stop()


def _read_model(settings: RouterSettings) -> tuple[Tokenizer, ModelFacts]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text at a time: its library's own threads only cost
    folder = resolve(settings.model, weights=False)
    tokenizer = Tokenizer.load(folder)
    return tokenizer, ModelFacts.load(folder, tokenizer, settings.model)


class _Router:
    """The parts that need a bus or a store."""

    def __init__(
        self,
        settings: RouterSettings,
        dispatcher: Dispatcher,
        status: StatusSource,
        store: Store,
        metrics: RouterMetrics,
        observers: Observers,
        fleet_page: FleetPage,
        tracer: Tracer,
    ) -> None:
        self.fleet_page = fleet_page
        self._settings = settings
        self._dispatcher = dispatcher
        self._store = store
        self._metrics = metrics
        self._observers = observers
        self._status = status
        self._tracer = tracer

    @classmethod
    async def open(
        cls,
        settings: RouterSettings,
        name: str,
        metrics_url: str,
        facts: ModelFacts,
        tracer: Tracer,
        stack: AsyncExitStack,
    ) -> _Router:
        cluster = settings.cluster
        life = f"{name}-{secrets.token_hex(4)}"
        subjects = Subjects(subject_token(cluster.cluster))
        core = RouterCore(
            router=life,
            name=name,
            incarnation=secrets.randbits(63) | 1,
            subjects=subjects,
            settings=settings.routing,
            metrics_url=metrics_url,
        )
        metrics = RouterMetrics(
            model_name=served_names(settings.model)[0],
            engine=name,
            max_model_len=facts.max_model_len,
            legacy=settings.worker.legacy_metrics,
        )
        status = StatusSource(core, name=name, model=served_names(settings.model)[0])
        store = await Store.connect(
            address_of(cluster.redis, "--redis"), cluster=cluster.cluster, connect_timeout_s=cluster.connect_timeout
        )
        stack.push_async_callback(store.close)

        def save(record: Record) -> None:
            store.save(record)
            status.saved(record)

        dispatcher = await Dispatcher.open(
            core,
            nats=address_of(cluster.nats, "--nats"),
            subjects=subjects,
            life=life,
            connect_timeout_s=cluster.connect_timeout,
            save=save,
            page=metrics.page,
            round_trip=metrics.metrics.histogram("splitserve_bus_round_trip_seconds").observe,
            tracer=tracer,
        )
        stack.push_async_callback(dispatcher.close)
        dispatcher.delivered = status.delivered
        store.announce(life, core.incarnation)
        page = FleetPage(dispatcher.beats, subjects, lives=dispatcher.lives, own=metrics.page)
        observers, gauges = Observers(metrics, status.observer), Gauges(metrics.metrics, dispatcher, store)

        def refresh() -> None:
            observers.flush()
            gauges.refresh()

        metrics.refresh = refresh
        return cls(settings, dispatcher, status, store, metrics, observers, page, tracer)

    async def watch_lag(self) -> None:
        """Until cancelled: tell how late the loop is, and what the observers gathered meanwhile."""
        observe = self._metrics.metrics.histogram("splitserve_event_loop_lag_seconds").observe

        def look(late_s: float) -> None:
            observe(late_s)
            self._observers.flush()

        await watch_lag(look)

    def readiness(self, tokenizer: Tokenizer) -> Readiness:
        ids = tuple(tokenizer.encode("Ready?", False))
        if not ids:
            raise ConfigError("the tokenizer gives no ids for a word: it does not fit the model")
        return Readiness(
            self._dispatcher,
            model=served_names(self._settings.model)[0],
            ids=ids,
            split="never" if self._settings.routing.split == "never" else "always",
            decode_lives=lambda: Role.DECODE in self._dispatcher.live_roles(),
        )

    def parts(self, tokenizer: Tokenizer, facts: ModelFacts, readiness: Readiness) -> RouterParts:
        feed = self._status.feed(
            why_not_ready=readiness.why_not,
            bus_up=lambda: self._dispatcher.bus.connected,
            degraded=lambda: self._store.degraded,
        )
        return RouterParts(
            generator=self._dispatcher,
            tokenizer=tokenizer,
            facts=facts,
            model_names=served_names(self._settings.model),
            http=self._settings.http,
            routing=self._settings.routing,
            read_request=self._read_request,
            why_not_ready=readiness.why_not,
            metrics_pages={FLEET_PAGE: self.fleet_page.page, ROUTER_PAGE: self._own_page},
            observer=self._observers,
            status=feed if self._settings.http.status_page else None,
            tracer=self._tracer,
            trust_request_chat_template=self._settings.model.trust_request_chat_template,
        )

    async def _read_request(self, rid: str) -> Mapping[str, object] | None:
        record = self._dispatcher.record(rid)
        if record is not None:
            return shown(rid, {**record.row().fields, "owner": record.owner})
        fields = await self._store.read(rid)
        if fields is None:
            return None
        if live(fields) and await self._store.gone(fields["owner"]):
            fields = lost(fields)
        return shown(rid, fields)

    async def _own_page(self, accept: str) -> tuple[bytes, str]:
        return self._metrics.answer(accept)
