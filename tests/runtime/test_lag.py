from __future__ import annotations

import asyncio
import time

from splitserve.runtime.lag import watch_lag
from support.waiting import until


async def test_a_blocked_loop_is_late_by_as_long_as_it_was_blocked() -> None:
    seen: list[float] = []
    task = asyncio.create_task(watch_lag(seen.append, every_s=0.01))
    try:
        await until(lambda: bool(seen), "the first measure")
        time.sleep(0.2)
        await until(lambda: max(seen) >= 0.15, "the measure of the block")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert min(seen) >= 0
