"""Waiting for a condition in a test: always with an end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def until(condition: Callable[[], bool], what: str, within_s: float = 10.0) -> None:
    """Poll `condition`; TimeoutError naming `what` when it does not come true in time."""
    give_up = asyncio.get_running_loop().time() + within_s
    while not condition():
        if asyncio.get_running_loop().time() > give_up:
            raise TimeoutError(f"{what} did not happen in {within_s:g} s")
        await asyncio.sleep(0.005)
