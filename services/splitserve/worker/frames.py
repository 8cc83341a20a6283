"""Token rows into frames: one a step and router, numbered by router."""

from __future__ import annotations

from collections.abc import Iterator

from splitserve.protocol.effects import Publish
from splitserve.protocol.messages import TokenFrame, TokenRow
from splitserve.protocol.states import FinishReason
from splitserve.protocol.subjects import Subjects


def pieces(row: TokenRow, tokens: int) -> Iterator[TokenRow]:
    """A long row as rows of at most `tokens`, the finish on the last, the first row's durations on the first."""
    for at in range(0, max(1, len(row.ids)), tokens):
        last = at + tokens >= len(row.ids)
        yield row._replace(
            first_index=row.first_index + at,
            ids=row.ids[at : at + tokens],
            finish=row.finish if last else FinishReason.RUNNING,
            first=row.first if at == 0 else None,
            logprobs=row.logprobs[at : at + tokens],
        )


class Frames:
    """Collects rows between two flushes."""

    def __init__(self, worker: str, incarnation: int, subjects: Subjects, frame_tokens: int) -> None:
        self._worker = worker
        self._incarnation = incarnation
        self._subjects = subjects
        self._frame_tokens = frame_tokens
        self._seq: dict[str, int] = {}
        self._rows: dict[str, list[TokenRow]] = {}

    def last(self, router: str) -> int:
        """Number of the last frame to this router; 0 before the first."""
        return self._seq.get(router, 0)

    def add(self, router: str, row: TokenRow) -> None:
        self._rows.setdefault(router, []).append(row)

    def flush(self) -> list[Publish]:
        """All rows since the last flush: a frame a router, more only where they are over `frame_tokens`."""
        commands: list[Publish] = []
        for router, rows in self._rows.items():
            commands.extend(self._frame(router, batch) for batch in self._batches(rows))
        self._rows.clear()
        return commands

    def _batches(self, rows: list[TokenRow]) -> Iterator[list[TokenRow]]:
        batch: list[TokenRow] = []
        size = 0
        for row in rows:
            for piece in pieces(row, self._frame_tokens):
                if batch and size + len(piece.ids) > self._frame_tokens:
                    yield batch
                    batch, size = [], 0
                batch.append(piece)
                size += len(piece.ids)
        yield batch

    def _frame(self, router: str, rows: list[TokenRow]) -> Publish:
        seq = self._seq[router] = self.last(router) + 1
        frame = TokenFrame.of(self._worker, self._incarnation, seq, rows)
        return Publish(self._subjects.router_events(router), frame)
