"""A file that one process at a time holds: what is made once for a user is made by one of those that start together."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from splitserve.deadlines import Deadline

_LOOK_S = 0.2


@contextmanager
def locked(path: Path, timeout_s: float, waiting: Callable[[], None] = lambda: None) -> Generator[None]:
    """Hold `path` exclusively; `waiting` is told at each look. The kernel lets go of it when the holder dies.

    Blocks. TimeoutError, with what to do, after `timeout_s`.
    """
    deadline = Deadline.after(timeout_s, time.monotonic(), f"the lock {path}")
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if deadline.over(time.monotonic()):
                    raise TimeoutError(
                        f"another process has held {path} for {timeout_s:g} s: is it stuck? Stop it and start again"
                    ) from None
                waiting()
                time.sleep(_LOOK_S)
        yield
