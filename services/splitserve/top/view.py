"""A snapshot as text for a terminal. Pure: snapshot in, renderables out."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from splitserve.protocol.states import Role
from splitserve.protocol.status import RequestView, RouterView, Snapshot, WorkerView
from splitserve.top.words import age, duration, share

WIDE = 144  # characters that every column needs
BAR = 12  # cells
STAGES = 24
WIDE_ONLY = frozenset({"workers", "attempts", "ended"})
REQUESTS = 12  # rows, unless the terminal is lower
MARKS = {  # of a stage: its colour, and a sign for those who see no colours
    "tokenise": ("bright_black", "·"), "place": ("bright_black", "·"), "reserve": ("blue", "·"),
    "prefill_bus": ("dark_goldenrod", "·"), "prefill_queue": ("dark_goldenrod", "░"), "prefill": ("yellow", "▓"),
    "handle": ("medium_purple", "»"), "transfer": ("magenta", "»"),
    "decode_queue": ("dark_cyan", "░"), "first_step": ("dark_cyan", "█"), "decode": ("cyan", "█"),
}  # fmt: skip
OTHER = ("bright_black", "·")
BAD = frozenset({"lost", "stuck", "failed"})
WORRYING = frozenset({"suspect", "draining", "starting"})


def view(snapshot: Snapshot, *, rows: int = REQUESTS, width: int = WIDE) -> RenderableType:
    """The whole screen: `rows` requests at most, fewer columns where it is narrower than `WIDE` characters."""
    requests = [*snapshot.live, *snapshot.recent]
    return Group(
        _head(snapshot.router),
        _load(snapshot),
        Text(),
        _workers(snapshot.workers, Role.PREFILL),
        Text(),
        _workers(snapshot.workers, Role.DECODE),
        Text(),
        _requests(requests[:rows], len(requests), wide=width >= WIDE),
    )


def _head(router: RouterView) -> Text:
    troubles = [
        text
        for is_so, text in (
            (bool(router.why_not_ready), f"not ready: {router.why_not_ready}"),
            (not router.bus_up, "the bus is away"),
            (router.degraded, "Redis is away"),
        )
        if is_so
    ]
    text = Text.assemble((router.name, "bold"), f"  {router.model}  up {age(router.up_s)}  ")
    return text.append("; ".join(troubles) or "ready", "yellow" if troubles else "green")


def _load(snapshot: Snapshot) -> Text:
    load = snapshot.load
    states = ", ".join(f"{count} {state}" for state, count in load.states.items() if count) or "no live request"
    ended = ", ".join(f"{count} {state}" for state, count in load.outcomes.items())
    return Text.assemble(
        (f"{load.tokens_per_s:.1f}", "bold"), " tokens/s   TTFT ", (duration(load.ttft_s), "bold"),
        "   inter-token ", (duration(load.inter_token_s), "bold"), " (medians of the last minute)\n",
        f"{states}; {load.waiting} wait for a worker with {load.waiting_tokens} prompt tokens; last minute: {ended}",
    )  # fmt: skip


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=False)
    for column in columns:
        right = column in ("running", "waiting", "to read", "step", "known", "attempts", "tokens", "time", "ended")
        table.add_column(column, justify="right" if right else "left", no_wrap=True, overflow="ellipsis")
    return table


def _workers(workers: Iterable[WorkerView], role: Role) -> RenderableType:
    of_role = [worker for worker in workers if worker.role == role]
    if not of_role:
        return Text(f"no {role} worker", "dim")
    colour = "yellow" if role is Role.PREFILL else "cyan"
    table = _table(role, "state", "running", "waiting", "to read", "KV in use", "step", "known")
    for worker in of_role:
        silent = f", silent {age(worker.silent_s)}" if worker.state in ("lost", "stuck", "suspect") else ""
        table.add_row(
            Text(worker.name, colour),
            Text(f"{worker.state}{silent}", _tone(worker.state)),
            *(_numbers(worker, colour) if worker.state not in BAD else ["–"] * 5),
            age(worker.since_s),
        )
    return table


def _numbers(worker: WorkerView, colour: str) -> list[RenderableType]:
    full, empty = share(worker.kv_used, BAR)
    return [
        str(worker.running),
        str(worker.waiting),
        str(worker.queued_tokens),
        Text.assemble((full, colour), (empty, "bright_black"), f" {worker.kv_used:4.0%}"),
        duration(worker.step_age_s) if worker.step_age_s else "idle",
    ]


def _requests(requests: list[RequestView], total: int, *, wide: bool) -> RenderableType:
    if not requests:
        return Text("no request yet", "dim")
    names = ("state", "workers", "attempts", "tokens", "time", "ended", "stages")
    table = _table(f"request (of {total})", *(name for name in names if wide or name not in WIDE_ONLY))
    for request in requests:
        cells = {
            "state": Text(f"{request.state} {request.error}".strip(), _tone(request.state)),
            "workers": " → ".join(name for name in (request.prefill, request.decode) if name) or "–",
            "attempts": f"{request.attempts_prefill}+{request.attempts_decode}",
            "tokens": f"{request.prompt_tokens}→{request.completion_tokens}",
            "time": duration(request.seconds),
            "ended": "lives" if request.ended_s is None else f"{age(request.ended_s)} ago",
            "stages": _stages(request, STAGES if wide else STAGES // 2),
        }
        table.add_row(request.id[:18], *(cell for name, cell in cells.items() if wide or name not in WIDE_ONLY))
    return table


def _stages(request: RequestView, width: int) -> Text:
    """The bar, and the longest stage by name: colours alone tell not everybody."""
    total = sum(seconds for _, seconds in request.bar) or 1.0
    text, cells, passed = Text(), 0, 0.0
    for name, seconds in request.bar:
        passed += seconds
        end = round(passed / total * width)
        colour, sign = MARKS.get(name, OTHER)
        text.append(sign * (end - cells), colour)
        cells = end
    name, seconds = max(request.bar, key=lambda part: part[1])
    return text.append(f" {name} {duration(seconds)}", "dim")


def _tone(state: str) -> str:
    return "red" if state in BAD else "yellow" if state in WORRYING else ""
