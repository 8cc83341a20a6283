"""The mock workers of the router's benchmark say enough for a request to go its whole way."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from contextlib import AsyncExitStack

from bench.mock_workers import MockWorkers
from splitserve.bus.bus import Bus
from splitserve.config import RoutingSettings
from splitserve.protocol.params import SamplingParams
from splitserve.protocol.states import FinishReason
from splitserve.protocol.subjects import Subjects
from splitserve.router.core import RouterCore
from splitserve.router.dispatcher import Dispatcher, ended
from splitserve.router.generation import Done, Finished, GenerationEvent, Submission, Tokens
from support.servers import Server
from support.waiting import until

MODEL = "mock"  # as their beats have it


async def test_a_request_is_read_handed_over_and_answered_to_its_last_token(shared_nats: Server):
    subjects = Subjects(f"t-{secrets.token_hex(4)}")
    settings = RoutingSettings.model_validate({"split": "always"})
    core = RouterCore(router="life", name="router-0", incarnation=9, subjects=subjects, settings=settings)
    heard: list[GenerationEvent] = []
    async with AsyncExitStack() as stack:
        bus = await Bus.connect(shared_nats.url, name="mock", role="decode", connect_timeout_s=10)
        stack.push_async_callback(bus.close)
        dispatcher = await Dispatcher.open(
            core,
            nats=shared_nats.url,
            subjects=subjects,
            life="life",
            connect_timeout_s=10,
            save=lambda record: None,
            page=lambda: b"",
        )
        stack.push_async_callback(dispatcher.close)
        stack.push_async_callback(ended, asyncio.create_task(MockWorkers(bus, subjects, 2).run(0.005)))
        await until(lambda: len(list(core.fleet)) == 3, "all beats")
        params = SamplingParams(max_tokens=20)
        submission = Submission("r1", MODEL, tuple(range(200)), params, seeds=(7,), timeout_s=10)
        async with dispatcher.submit(submission, heard.append):
            await until(lambda: bool(heard) and isinstance(heard[-1], Done), "the end")
    tokens = [event for event in heard if isinstance(event, Tokens)]
    assert [event.first_index for event in tokens] == list(range(20))
    assert Counter(len(event.ids) for event in tokens) == {1: 20}
    assert heard[-2] == Finished(0, FinishReason.LENGTH)
    done = heard[-1]
    assert isinstance(done, Done)
    assert done.error is None
    assert {"prefill", "transfer", "first_step"} <= set(done.stages)
