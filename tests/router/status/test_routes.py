"""The page's routes: what is open, what asks for the key, what never shows, and how streams begin and end."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import orjson
import pytest

from splitserve.config import HttpSettings
from splitserve.protocol.status import Snapshot
from splitserve.router.effects import Submit
from splitserve.router.status.feed import StatusFeed
from splitserve.router.status.recent import Recent
from splitserve.router.status.routes import EVENTS, SHELL, SNAPSHOT
from splitserve.router.status.snapshot import snapshot
from support.generation import ScriptedGenerator, in_process, says, served
from support.router_bench import Bench
from support.status import ROUTER, cluster

KEYED = HttpSettings(api_key="first,second")


def feed(**changes: Any) -> StatusFeed:
    return StatusFeed(lambda now: cluster(), **changes)


@asynccontextmanager
async def in_router(status: StatusFeed, **changes: Any) -> AsyncGenerator[httpx.AsyncClient, None]:
    """A client of a router over a real socket; streams need one."""
    async with served(ScriptedGenerator(says("ok")), status=status, **changes) as port:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as api:
            yield api
        status.close()


@pytest.mark.parametrize("path", sorted(SHELL))
async def test_each_file_of_the_shell_is_there_under_a_strict_policy_and_needs_no_key(path: str):
    async with in_process(ScriptedGenerator(says("ok")), status=feed(), http=KEYED) as api:
        answer = await api.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, SHELL[path][1])
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"(src|href|url\()\s*=?\s*[\"']?(https?:)?//", answer.text), "nothing from elsewhere"
    assert not re.search(r"<[^>]+\s(style|on\w+)=", answer.text), "no inline style or handler"


async def test_the_files_that_the_page_names_are_those_that_are_served():
    async with in_process(ScriptedGenerator(says("ok")), status=feed()) as api:
        page = (await api.get("/")).text
        assert re.search(r"<noscript>.*href=\"status.json\".*</noscript>", page)
        scripts = [(await api.get(path)).text for path in SHELL if path.endswith(".js")]
    named = {f"/{path}" for path in re.findall(r'(?:src|href)="(status/[^"]+)"', page)}
    named |= {f"/status/{name}" for text in scripts for name in re.findall(r'from "\./([^"]+)"', text)}
    assert named == set(SHELL) - {"/"}


@pytest.mark.parametrize("path", [SNAPSHOT, EVENTS])
async def test_data_asks_for_the_key(path: str):
    async with in_router(feed(), http=KEYED) as api:
        assert (await api.get(path)).status_code == 401
        assert (await api.get(path, headers={"authorization": "Bearer third"})).status_code == 401
        async with api.stream("GET", path, headers={"authorization": "Bearer second"}) as answer:
            assert answer.status_code == 200


@pytest.mark.parametrize("path", ["/", "/status/main.js", SNAPSHOT, EVENTS])
async def test_without_the_page_there_is_nothing(path: str):
    async with in_process(ScriptedGenerator(says("ok"))) as api:
        assert (await api.get(path)).status_code == 404


async def test_the_snapshot_is_what_the_router_shows_and_is_described():
    async with in_process(ScriptedGenerator(says("ok")), status=feed()) as api:
        shown = (await api.get(SNAPSHOT)).json()
        paths = (await api.get("/openapi.json")).json()["paths"]
    assert shown == orjson.loads(orjson.dumps(cluster()))
    assert SNAPSHOT in paths
    assert not {"/", EVENTS} & set(paths)


async def test_snapshots_come_as_events_and_end_when_the_router_leaves():
    status = feed(every_s=0.01)
    count = 0
    async with in_router(status) as api, api.stream("GET", EVENTS) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        async for line in answer.aiter_lines():
            count += line.startswith("data: ")
            if count == 3:
                status.close()
    assert count >= 3


async def test_however_many_look_a_snapshot_is_made_once_in_its_time_and_never_for_nobody():
    taken = 0

    def look(now: float) -> Snapshot:
        nonlocal taken
        taken += 1
        return cluster()

    status = StatusFeed(look, every_s=60.0)
    async with in_router(status) as api:
        assert taken == 0
        pages = await asyncio.gather(*(api.get(SNAPSHOT) for _ in range(20)))
        async with api.stream("GET", EVENTS) as answer:
            await anext(answer.aiter_lines())
    assert {page.status_code for page in pages} == {200}
    assert taken == 1


async def test_one_viewer_too_many_is_refused_and_a_place_is_free_when_one_leaves():
    status = feed(viewers=1, every_s=0.01)
    async with status.viewing() as pages:
        await anext(pages)
        async with in_process(ScriptedGenerator(says("ok")), status=status) as api:
            answer = await api.get(EVENTS)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
        assert answer.headers["retry-after"] == "10"
    async with status.viewing() as pages:
        assert await anext(pages)


async def test_who_asks_for_the_head_of_the_stream_takes_no_place():
    status = feed(viewers=1, every_s=60.0)
    async with in_router(status) as api:
        for _ in range(3):
            answer = await api.head(EVENTS)
            assert answer.headers["content-type"].startswith("text/event-stream")
        async with api.stream("GET", EVENTS) as answer:
            assert answer.status_code == 200


async def test_a_viewer_that_leaves_frees_its_place():
    status = feed(viewers=1, every_s=0.01)
    async with in_router(status) as api:
        for _ in range(3):
            async with asyncio.timeout(10):
                while True:
                    async with api.stream("GET", EVENTS) as answer:
                        if answer.status_code == 200:
                            break


async def test_nothing_of_what_a_request_says_is_ever_shown():
    """Through the real core: marked prompt, user, salt and client id go in; the whole JSON knows none of them."""
    marker = "ZEBRA-8d1f"
    core, recent = Bench(), Recent()
    generator = ScriptedGenerator(says(marker))
    status = StatusFeed(lambda now: snapshot(core.core, recent, ROUTER, core.now), every_s=0.0)
    message = {"role": "user", "content": marker, "name": marker}
    async with in_process(generator, status=status) as api:
        answer = await api.post(
            "/v1/chat/completions",
            json={"messages": [message], "user": marker, "cache_salt": marker, "max_tokens": 20},
            headers={"x-request-id": marker},
        )
        assert marker in answer.text
        submission = generator.submitted[0].submission
        core.send(Submit(replace(submission, model="m")))
        live = (await api.get(SNAPSHOT)).text
        core.leave(submission.rid)
        for record in core.records:
            recent.saved(record, core.now)
        ended = (await api.get(SNAPSHOT)).text
    for shown in (live, ended):
        assert submission.rid in shown
        assert marker.lower() not in shown.lower()
        assert ",".join(map(str, submission.ids[:4])) not in shown
