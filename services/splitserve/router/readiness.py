"""Ready means: a two-token generation went through, split by force. From then on, while a decode worker lives."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable

from splitserve.errors import SplitserveError
from splitserve.protocol.params import SamplingParams
from splitserve.router.generation import PROBE_ID, Done, GenerationEvent, Generator, Submission

log = logging.getLogger("splitserve.router")

EVERY_S = 0.25
PROBE_S = 10.0  # a model's first step may be slow


class Readiness:
    """The proof, and the answer to `/ready`. `split`: "always", or "never" where the router never splits."""

    def __init__(
        self,
        generator: Generator,
        *,
        model: str,
        ids: tuple[int, ...],
        split: str,
        decode_lives: Callable[[], bool],
    ) -> None:
        self._generator = generator
        self._model = model
        self._ids = ids
        self._split = split
        self._decode_lives = decode_lives
        self._last = "no generation was tried yet"
        self.proven = False

    def why_not(self) -> str:
        """The reason for a 503, "" when ready."""
        if not self.proven:
            return f"no generation went through yet: {self._last}"
        return "" if self._decode_lives() else "no decode worker lives"

    async def prove(self) -> None:
        """Try until one generation went through; whoever waits for readiness sets the deadline."""
        while not self.proven:
            error = await self._try()
            if error is None:
                self.proven = True
                log.info("ready")
            else:
                self._last = error.message
                await asyncio.sleep(EVERY_S)

    async def _try(self) -> SplitserveError | None:
        submission = Submission(
            rid=f"{PROBE_ID}{secrets.token_hex(8)}",
            model=self._model,
            ids=self._ids,
            params=SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True),
            seeds=(0,),
            timeout_s=PROBE_S,
            split=self._split,
        )
        try:
            done: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
            async with self._generator.submit(submission, lambda event: _end(event, done)):
                return (await done).error
        except SplitserveError as error:
            return error


def _end(event: GenerationEvent, done: asyncio.Future[Done]) -> None:
    if isinstance(event, Done) and not done.done():  # nobody waits any more when we are cancelled
        done.set_result(event)
