"""What a row of the metric table says: a family, its owner, and which of its series are known beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

ENGINE_LABELS = ("model_name", "engine")


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    SUMMARY = "summary"


class Owner(StrEnum):
    ROUTER = "router"
    PREFILL = "prefill"
    DECODE = "decode"
    WORKER = "worker"  # prefill and decode alike
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Series:
    """One series known beforehand, by the values of `Family.labels`.

    `constant` says why it keeps `value` for ever; `rare` says what must go wrong, or be asked for, to move it.
    """

    values: tuple[str, ...] = ()
    value: float = 0.0
    constant: str = ""
    rare: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """One family, named as in OpenMetrics: a counter's samples end in `_total`.

    `labels` come beside `identity`, whose values are the process's own. `series` are exported from the start; a family
    with labels and no `series` gets them with its events.
    """

    name: str
    kind: Kind
    owner: Owner
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    series: tuple[Series, ...] = ()
    identity: tuple[str, ...] = ENGINE_LABELS

    @property
    def known(self) -> tuple[Series, ...]:
        """The series that a page has before anything happened."""
        return self.series or (() if self.labels else (Series(),))


def each(*values: str) -> tuple[Series, ...]:
    """A series for each value of a family's one label."""
    return tuple(Series((value,)) for value in values)


def constant(why: str, *values: str, value: float = 0.0) -> tuple[Series, ...]:
    """One series that never moves."""
    return (Series(values, value, constant=why),)


def rare(why: str, *values: str) -> tuple[Series, ...]:
    """A series for each value, or the one without labels, that an undisturbed cluster never moves."""
    return tuple(Series((value,) if value else (), rare=why) for value in values or ("",))
