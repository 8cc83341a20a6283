"""The jobs of a decode worker by request, slot and router, and the blocks that they were promised."""

from __future__ import annotations

from collections.abc import Iterator

from splitserve.decode.effects import Key
from splitserve.decode.job import Job, promised_blocks
from splitserve.protocol.states import DecodeState


class JobTable:
    """One attempt a request. `copying` holds the blocks of ended jobs whose fetch has not ended."""

    def __init__(self, block_tokens: int, promise_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._promise_tokens = promise_tokens
        self._jobs: dict[str, Job] = {}
        self._slots: dict[tuple[str, int], tuple[Job, int]] = {}
        self.copying: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        """A copy: jobs may be removed while going through."""
        return iter(tuple(self._jobs.values()))

    def get(self, rid: str) -> Job | None:
        return self._jobs.get(rid)

    def at(self, key: object) -> Job | None:
        """The job of an engine's or reader's key; None when that attempt is over."""
        if not isinstance(key, tuple):
            return None
        job = self._jobs.get(key[0])
        return job if job is not None and job.key == key else None

    def slot(self, router: str, slot: int) -> tuple[Job, int] | None:
        """Whose slot it is, and the sequence's number."""
        return self._slots.get((router, slot))

    def of(self, router: str) -> list[Job]:
        return [job for job in self._jobs.values() if job.asked.router == router]

    def add(self, job: Job) -> None:
        self._jobs[job.asked.rid] = job
        for number in range(len(job.sequences)):
            self._slots[job.asked.router, job.asked.slot + number] = (job, number)

    def remove(self, job: Job) -> None:
        del self._jobs[job.asked.rid]
        for number in range(len(job.sequences)):
            self._slots.pop((job.asked.router, job.asked.slot + number), None)

    def blocks(self, job: Job) -> int:
        """What is promised to a job as it stands."""
        if job.state is DecodeState.DONE:
            return 0
        return promised_blocks(job.asked, job.sequences, self._block_tokens, self._promise_tokens)

    @property
    def promised_blocks(self) -> int:
        return sum(self.copying.values()) + sum(self.blocks(job) for job in self._jobs.values())

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that are still to be computed here."""
        return sum(job.tokens_left for job in self._jobs.values())
