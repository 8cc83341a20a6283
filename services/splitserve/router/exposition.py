"""Metrics pages as text: cut into families, added, joined. Pure.

Pages are Prometheus text format 0.0.4 as prometheus_client writes it: HELP, TYPE, samples, family by family. Values are
read only where two series must become one (`added`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS
from prometheus_client.utils import floatToGoString

TEXT = CONTENT_TYPE_PLAIN_0_0_4
_CUMULATIVE = frozenset({"counter", "histogram", "summary"})
_TOTAL = "_total"

Values = Mapping[str, float]  # series (name and labels as written) -> value


@dataclass(frozen=True, slots=True)
class Family:
    """One family of one page. `help` and `samples` are as they were written; each line of `samples` ends in a newline."""

    name: str
    kind: str
    help: str
    samples: str

    @property
    def cumulative(self) -> bool:
        """It only grows while its process lives."""
        return self.kind in _CUMULATIVE

    def values(self) -> dict[str, float]:
        """Every series and its value, in order."""
        found: dict[str, float] = {}
        for line in self.samples.splitlines():
            series, _, value = line.rpartition(" ")
            found[series] = float(value)
        return found


Page = Mapping[str, Family]  # by name, in order


def cut(text: str) -> dict[str, Family]:
    """The families of a page. ValueError for a text that is no page."""
    page: dict[str, Family] = {}
    for block in ("\n" + text).split("\n# HELP ")[1:]:
        head, mark, rest = block.partition("\n# TYPE ")
        kind, _, samples = rest.partition("\n")
        name, _, help_text = head.partition(" ")
        if not mark or not kind.startswith(f"{name} "):
            raise ValueError(f"family {name[:80]!r} has no TYPE line behind its HELP line")
        if samples and not samples.endswith("\n"):
            samples += "\n"
        page[name] = Family(name, kind[len(name) + 1 :], help_text, samples)
    return page


def added(family: Family, base: Values) -> Family:
    """`family` with `base` added series by series; series that only `base` has come last."""
    values = family.values()
    for series, value in base.items():
        values[series] = values.get(series, 0.0) + value
    samples = "".join(f"{series} {floatToGoString(value)}\n" for series, value in values.items())
    return Family(family.name, family.kind, family.help, samples)


def joined(pages: Iterable[Page]) -> dict[str, Family]:
    """One page of many: each family once, in the order of first sight, with the samples of all.

    The label `engine` keeps series apart. A family without it (HTTP's, rejections, older names) has the same series in
    many processes: counts are added, and of gauges, which are shares, the mean is shown. Where two builds disagree on a family's type, the first one's stands and the other is left out.
    """
    found: dict[str, list[Family]] = {}
    for page in pages:
        for name, family in page.items():
            same = found.setdefault(name, [])
            if not same or same[0].kind == family.kind:
                same.append(family)
    return {name: _joined(same) for name, same in found.items()}


def _joined(same: list[Family]) -> Family:
    first = same[0]
    if len(same) == 1:
        return first
    apart = [family.samples for family in same if 'engine="' in family.samples]
    alike = [family for family in same if family.samples and 'engine="' not in family.samples]
    return Family(first.name, first.kind, first.help, "".join([*apart, *([_merged(alike).samples] if alike else [])]))


def _merged(alike: list[Family]) -> Family:
    whole = alike[0]
    for family in alike[1:]:
        whole = added(whole, family.values())
    if whole.kind != "gauge" or len(alike) == 1:
        return whole
    samples = "".join(f"{series} {floatToGoString(value / len(alike))}\n" for series, value in whole.values().items())
    return Family(whole.name, whole.kind, whole.help, samples)


def content_type(accept: str) -> str:
    """`OPENMETRICS` for who takes it, else `TEXT`."""
    return OPENMETRICS if "application/openmetrics-text" in accept else TEXT


def written(page: Page, kind: str) -> bytes:
    """The page in the format of this content type."""
    return _openmetrics_page(page) if kind == OPENMETRICS else _text_page(page)


def _text_page(page: Page) -> bytes:
    lines = (f"# HELP {f.name} {f.help}\n# TYPE {f.name} {f.kind}\n{f.samples}" for f in page.values())
    return "".join(lines).encode()


def _openmetrics_page(page: Page) -> bytes:
    """OpenMetrics names a counter's family without `_total`, and says where the page ends."""
    lines = (_openmetrics_family(family) for family in page.values() if not _is_creation(family, page))
    return ("".join(lines) + "# EOF\n").encode()


def _openmetrics_family(family: Family) -> str:
    name = family.name.removesuffix(_TOTAL) if family.kind == "counter" else family.name
    kind = "unknown" if family.kind == "untyped" else family.kind
    escaped = family.help.replace('"', r"\"")
    return f"# HELP {name} {escaped}\n# TYPE {name} {kind}\n{family.samples}"


def _is_creation(family: Family, page: Page) -> bool:
    """When a series was made: a family of its own in the text format, part of its counter's in OpenMetrics."""
    owner = family.name.removesuffix("_created")
    return owner != family.name and (owner in page or owner + _TOTAL in page)
