"""The whole fleet's metrics as one page: what is shown of the living, of the dead and of those who came back. Pure.

The sums of counters over the page do not fall when a process dies or starts again. What is lost, and cannot be had back:
- what a process counted between the last pull and its death (a pull every `PULL_S`, and one a scrape);
- a dead process's counters once they were frozen for `KEEP_S`; from then on sums are lower by them;
- everything frozen or carried, when *this* router starts again: its memory is the only one.
Prometheus needs none of this: it scrapes each process by itself, and `rate()` knows a reset when it sees one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from splitserve.router.account import Life
from splitserve.router.exposition import Family, Page, Values, added, cut, joined

KEEP_S = 900.0  # a dead process's counters stay for so long


@dataclass(slots=True)
class _Member:
    """One stable name. `base`: what its former lives counted, by family; `shown`: its page, `base` added."""

    life: Life
    page: Page = field(default_factory=dict[str, Family])
    base: dict[str, Values] = field(default_factory=dict[str, Values])
    shown: Page = field(default_factory=dict[str, Family])
    past: set[int] = field(default_factory=set[int])
    died_at: float | None = None

    def take(self, page: Page) -> None:
        self.page = page
        self.shown = {**page, **{name: self._carried(name, page) for name in self.base}} if self.base else page

    def _carried(self, name: str, page: Page) -> Family:
        family = page.get(name)
        return added(family or _without_samples(self.shown[name]), self.base[name])

    def reborn(self, life: Life) -> None:
        """Another life begins: what was shown of the counters so far is its base."""
        self.base = {name: family.values() for name, family in self.shown.items() if family.cumulative}
        self.past.add(self.life[1])
        self.life = life


class Federation:
    """Pages of all processes but this one, by stable name."""

    def __init__(self, keep_s: float = KEEP_S) -> None:
        self._keep_s = keep_s
        self._members: dict[str, _Member] = {}

    def __len__(self) -> int:
        return len(self._members)

    def took(self, life: Life, text: str) -> None:
        """A page came. One of a former life is too late and changes nothing. ValueError for a text that is no page."""
        page = cut(text)
        member = self._members.setdefault(life[0], _Member(life))
        if life[1] in member.past:
            return
        if life != member.life:
            member.reborn(life)
        member.died_at = None
        member.take(page)

    def living(self, lives: Iterable[Life], now: float) -> None:
        """Who lives. The others' gauges vanish at once and their counters freeze, until they are forgotten."""
        alive = set(lives)
        for name, member in list(self._members.items()):
            if member.life in alive:
                member.died_at = None
            elif member.died_at is None:
                member.died_at = now
            elif now - member.died_at > self._keep_s:
                del self._members[name]

    def page(self, own: str) -> dict[str, Family]:
        """The fleet's page. `own`: this router's, of now."""
        return joined([cut(own), *(_visible(member) for member in self._members.values())])


def _visible(member: _Member) -> Mapping[str, Family]:
    if member.died_at is None:
        return member.shown
    return {name: family for name, family in member.shown.items() if family.cumulative}


def _without_samples(family: Family) -> Family:
    return Family(family.name, family.kind, family.help, "")
