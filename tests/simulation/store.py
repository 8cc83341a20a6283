"""Redis as far as a request's state needs it: the group commit and the script's answers (`store.keys.SAVE_LUA`)."""

from __future__ import annotations

from dataclasses import dataclass

from simulation.invariants import require
from splitserve.store.store import StateRow


@dataclass(frozen=True, slots=True)
class Kept:
    row: StateRow
    expires_at: float


class ToyRedis:
    """One hash a request, with its age. Every row that it takes obeys invariant 12, or the run is broken."""

    def __init__(self) -> None:
        self.rows: dict[str, Kept] = {}
        self.refused = 0

    def save(self, row: StateRow, now: float) -> bool:
        """What the script does: a write of the owner with a higher seq, never past a final one."""
        require(row.ttl_s > 0, "redis_has_no_key_without_expiry", f"{row.rid} is written without an age")
        kept = self.rows.get(row.rid)
        if kept is not None:
            if kept.row.owner != row.owner:
                self.refused += 1
                return False
            if kept.row.seq == row.seq:
                return True
            if kept.row.final or kept.row.seq > row.seq:
                self.refused += 1
                return False
        self.rows[row.rid] = Kept(row, now + row.ttl_s)
        return True
