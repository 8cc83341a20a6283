"""Leaving in order: no new work, what is here ends, a limit on how long that may take."""

from __future__ import annotations

import asyncio
import logging

from splitserve.protocol.effects import Drain
from splitserve.runtime.process import Signals
from splitserve.runtime.shell import Shell

log = logging.getLogger("splitserve.worker")


async def drain(shell: Shell, signals: Signals, within_s: float) -> float:
    """Returns when nothing is left, after `within_s`, or at a second signal: what is left of `within_s` then."""
    loop = asyncio.get_running_loop()
    end = loop.time() + within_s
    log.info("draining", extra={"within_s": within_s})
    shell.put(Drain())
    empty = asyncio.ensure_future(shell.drained.wait())
    hurry = asyncio.ensure_future(signals.stop_now())
    await asyncio.wait({empty, hurry}, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
    for task in (empty, hurry):
        task.cancel()
    await asyncio.gather(empty, hurry, return_exceptions=True)
    if not shell.drained.is_set():
        log.warning("left before everything had ended")
    return max(0.0, end - loop.time())
