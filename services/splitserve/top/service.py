"""`splitserve top`: a router's status, live in a terminal or once."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from rich.console import Console
from rich.live import Live
from rich.text import Text

from splitserve.config import TopProcessSettings
from splitserve.errors import NeverReady
from splitserve.runtime.process import Signals
from splitserve.top.client import fetch, status_url
from splitserve.top.view import REQUESTS, WIDE, view

PAUSES_S = (1.0, 2.0, 4.0, 8.0)  # between tries while nobody answers
OVERHEAD = 12  # rows that are no requests, beside a row a worker


async def run(settings: TopProcessSettings, signals: Signals) -> None:
    """Show until a stop signal, or once. Raises ConfigError, and NeverReady when the first try finds nobody."""
    url = status_url(settings.top.url)
    key = settings.http.api_key.partition(",")[0].strip()
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)  # a pipe has no width of its own
    first = await asyncio.to_thread(fetch, url, key)
    if settings.top.once or not console.is_terminal:
        console.print(view(first, width=console.width))
        return
    with Live(view(first, width=console.width), console=console, screen=True, auto_refresh=False) as live:
        away = 0
        while not await _stopped(
            signals, settings.top.interval if not away else PAUSES_S[min(away, len(PAUSES_S)) - 1]
        ):
            try:
                snapshot = await asyncio.to_thread(fetch, url, key)
            except NeverReady as error:
                away += 1
                live.update(Text(f"lost contact: {error.message}", "red"), refresh=True)
                continue
            away = 0
            room = console.height - OVERHEAD - len(snapshot.workers)
            live.update(view(snapshot, rows=max(1, min(REQUESTS, room)), width=console.width), refresh=True)


async def _stopped(signals: Signals, seconds: float) -> bool:
    """Wait so long, or for a stop signal."""
    with suppress(TimeoutError):
        await asyncio.wait_for(signals.stop(), seconds)
    return signals.stopping
