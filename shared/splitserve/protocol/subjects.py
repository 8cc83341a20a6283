"""Every subject on the bus, once (`ss1.<cluster>.…`; "1" is the protocol's version).

| subject | from -> to | carries |
|---|---|---|
| `w.<wid>.in` | router -> worker | jobs, cancels, amends, resumes: one subject, so a cancel cannot overtake its job |
| `w.<wid>.kv` | prefill worker, router -> decode worker | KvReady |
| `w.<wid>.lease` | decode worker, router -> prefill worker | Release, Renew |
| `r.<router>.ev` | worker -> router | KvReady, KvLoaded, KvFailed, TokenFrame, Preempted, Digest |
| `hb.<role>.<id>` | all -> all | Beat (its own connection) |
| `m.<id>` | router -> worker, router | MetricsGet (on the beat connection) |

`<wid>` is a worker's stable name, `<router>` names one life of a router.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from splitserve.errors import ConfigError

_TOKEN = re.compile(r"[A-Za-z0-9_-]+")


def subject_token(name: str) -> str:
    """A name as one subject token: dots become dashes; anything else outside [A-Za-z0-9_-] is a ConfigError."""
    token = name.replace(".", "-")
    if not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"the name {name!r} cannot be used on the bus: only letters, digits, '-', '_' and '.' are allowed"
        )
    return token


@dataclass(frozen=True, slots=True)
class Subjects:
    """Subjects of one cluster."""

    cluster: str = "default"

    def _of(self, *parts: str) -> str:
        return ".".join(("ss1", self.cluster, *parts))

    def worker_in(self, wid: str) -> str:
        return self._of("w", wid, "in")

    def worker_kv(self, wid: str) -> str:
        return self._of("w", wid, "kv")

    def worker_lease(self, wid: str) -> str:
        return self._of("w", wid, "lease")

    def router_events(self, router: str) -> str:
        return self._of("r", router, "ev")

    def beat(self, role: str, name: str) -> str:
        return self._of("hb", role, name)

    @property
    def all_beats(self) -> str:
        return self._of("hb", ">")

    def metrics(self, name: str) -> str:
        return self._of("m", name)
