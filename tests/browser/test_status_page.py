"""The status page in a real browser: what is seen, at which widths, with which key, and when the router goes away."""

from __future__ import annotations

import shutil
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import product
from typing import Literal

import pytest
from playwright.async_api import Page, async_playwright, expect

from splitserve.config import HttpSettings
from splitserve.protocol.status import Snapshot
from splitserve.router.app import create_app
from splitserve.router.protocol import RouterProtocol
from splitserve.router.status.feed import StatusFeed
from splitserve.runtime.http import bind, port_of, serving
from support.generation import ScriptedGenerator, router_parts, says
from support.status import cluster, empty, request, status_page, worker

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
]
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt install chromium"),
    pytest.mark.e2e,
]
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


@asynccontextmanager
async def page(width: int = 1180) -> AsyncGenerator[Page, None]:
    """A page of a fresh browser; whatever it says of errors or refused by the policy fails the test."""
    wrong: list[str] = []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = await browser.new_context(viewport={"width": width, "height": 740}, color_scheme="light")
        found = await context.new_page()
        found.on("pageerror", lambda error: wrong.append(str(error)))
        found.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
        yield found
        await browser.close()
    assert not wrong


class Shown:
    """A snapshot that a test changes."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def __call__(self) -> Snapshot:
        return self.snapshot


def many() -> Snapshot:
    name = "decode-gpu-host-17.rack4.example.internal-22310"
    return replace(cluster(6, 6), workers=(*cluster(6, 5).workers, worker(name, "decode", state="suspect")))


@pytest.mark.parametrize("look", [cluster, empty, many], ids=["busy", "empty", "many"])
async def test_nothing_is_wider_than_the_screen(look: Callable[[], Snapshot]):
    async with status_page(look) as port, page() as at:
        for width, scheme in product((360, 1180), SCHEMES):
            await at.set_viewport_size({"width": width, "height": 740})
            await at.emulate_media(color_scheme=scheme)
            await at.goto(f"http://127.0.0.1:{port}/")
            await expect(at.locator("#status")).to_be_visible()
            assert await at.evaluate("document.documentElement.scrollWidth") == width, scheme


async def test_workers_load_picture_and_requests_are_shown_and_follow_the_router():
    shown = Shown(cluster())
    async with status_page(shown) as port, page() as at:
        await at.goto(f"http://127.0.0.1:{port}/")
        await expect(at.get_by_role("table", name="Workers").get_by_role("row")).to_have_count(5)
        await expect(at.get_by_role("img", name="2 prefill and 2 decode workers, 2 live requests")).to_be_visible()
        await expect(at.locator("#numbers")).to_contain_text("412")
        await expect(at.get_by_role("table", name="Live and recent requests").get_by_role("row")).to_have_count(6)
        lost = replace(shown.snapshot.workers[3], state="lost", silent_s=3.0)
        shown.snapshot = replace(shown.snapshot, workers=(*shown.snapshot.workers[:3], lost))
        await expect(at.get_by_role("row", name="decode-1")).to_contain_text("lost, silent for 3 s")
        await expect(at.locator("#say")).to_have_text("decode-1: lost.")


async def test_a_requests_stages_open_by_keyboard_and_stay_open_while_numbers_move():
    shown = Shown(cluster())
    async with status_page(shown) as port, page() as at:
        await at.goto(f"http://127.0.0.1:{port}/")
        await at.locator("summary").first.focus()
        await at.keyboard.press("Enter")
        stages = at.locator("details[open] .durations")
        await expect(stages).to_contain_text("KV transfer")
        newer = request("chatcmpl-" + "d" * 32, "decoding", ended_s=None)
        shown.snapshot = replace(shown.snapshot, live=(*shown.snapshot.live, newer), live_total=3)
        await expect(at.get_by_role("img", name="3 live requests")).to_be_visible()
        await expect(stages).to_be_visible()


async def test_the_key_is_asked_for_kept_in_the_tab_and_a_wrong_one_is_said():
    async with status_page(cluster, http=HttpSettings(api_key="right")) as port, page(360) as at:
        await at.goto(f"http://127.0.0.1:{port}/")
        await expect(at.get_by_label("API key", exact=True)).to_be_focused()
        await expect(at.locator("#status")).to_be_hidden()
        await at.keyboard.type("wrong")
        await at.keyboard.press("Enter")
        await expect(at.get_by_role("alert")).to_have_text("That key is not one of the router's.")
        await at.keyboard.type("right")
        await at.keyboard.press("Enter")
        await expect(at.locator("#status")).to_be_visible()
        await at.reload()
        await expect(at.locator("#status")).to_be_visible()


async def test_a_router_that_goes_away_is_said_and_found_again_when_it_is_back():
    async with page() as at:
        async with status_page(cluster) as port:
            await at.goto(f"http://127.0.0.1:{port}/")
            await expect(at.locator("#contact-text")).to_have_text("live")
        await expect(at.locator("#contact-text")).to_contain_text("lost contact")
        await expect(at.locator("#status")).to_be_visible()  # the last numbers, pale
        feed = StatusFeed(lambda now: cluster(3, 3), every_s=0.1)
        sock = bind("127.0.0.1", port)
        assert port_of(sock) == port
        parts = router_parts(ScriptedGenerator(says("ok")), status=feed)
        async with serving(create_app(parts), sock, protocol=RouterProtocol):
            await expect(at.get_by_role("table", name="Workers").get_by_role("row")).to_have_count(7, timeout=20_000)
            await expect(at.locator("#contact-text")).to_have_text("live")
            feed.close()
