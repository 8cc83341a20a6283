"""What is to be done in the event loop's next turn, all of it in one callback.

A handle of the loop costs more than a token's text. And work of one kind done in a row finds the processor's caches warm:
with all texts made first, and only then written, a chunk costs less than when a reader wakes after each write.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

log = logging.getLogger("splitserve.router")


class Turn:
    """For one event loop."""

    def __init__(self) -> None:
        self._due: list[Callable[[], None]] = []

    def soon(self, act: Callable[[], None]) -> None:
        """Call `act` in the loop's next turn, behind what was given before it."""
        if not self._due:
            asyncio.get_running_loop().call_soon(self._run)
        self._due.append(act)

    def _run(self) -> None:
        due, self._due = self._due, []
        for act in due:
            try:
                act()
            except Exception:
                log.exception("failed unforeseen")  # it costs no other its turn
