"""How late the event loop is: a timer that measures itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

EVERY_S = 0.25


async def watch_lag(observe: Callable[[float], None], every_s: float = EVERY_S) -> None:
    """Until cancelled: sleep `every_s`, tell by how many seconds the loop woke us too late."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + every_s
        await asyncio.sleep(every_s)
        observe(max(0.0, loop.time() - due))
