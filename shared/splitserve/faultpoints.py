"""Named places where a test may make a real process fail: `SPLITSERVE_FAULTS="kv.bitflip:1,engine.step:sleep=2"`.

An empty variable, the normal case, costs one dictionary look-up a point. Each point says here what it does.
"""

from __future__ import annotations

from collections.abc import Mapping

POINTS: dict[str, str] = {
    "kv.bitflip": "flip one bit of a held block after its checksum was taken (count)",
    "kv.read_slow": "sleep before each block that is fetched (seconds)",
    "engine.step_slow": "sleep in each step (seconds)",
    "engine.step_raise": "raise in the n-th step (count)",
    "worker.drop_kv_ready": "do not publish the n-th KvReady (count)",
    "worker.drop_frame": "do not publish the n-th TokenFrame (count)",
    "worker.never_ready": "never report ready",
}


class Faults:
    """The faults of one process, parsed once. ValueError for a point that is not in `POINTS`."""

    def __init__(self, text: str = "") -> None:
        self._values: dict[str, float] = {}
        self._left: dict[str, int] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = item.partition(":")
            if name not in POINTS:
                raise ValueError(f"no fault point {name!r}; there are {', '.join(sorted(POINTS))}")
            self._values[name] = float(value or 1)
            self._left[name] = int(self._values[name])

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Faults:
        return cls(environ.get("SPLITSERVE_FAULTS", ""))

    def value(self, point: str) -> float:
        """The point's number, 0 when it is not set."""
        return self._values.get(point, 0.0)

    def fires(self, point: str) -> bool:
        """True once, on the n-th call for a point set to n."""
        left = self._left.get(point)
        if not left:
            return False
        self._left[point] = left - 1
        return left == 1
