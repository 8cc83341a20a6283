"""The PromQL that panels are made of: `$model` and the window are Grafana's variables."""

from __future__ import annotations

from panels import Panel, Row

M = 'model_name=~"$model"'
I = "[$__rate_interval]"  # noqa: E741
TTFT, ITL = "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"
TPOT, E2E = "vllm:request_time_per_output_token_seconds", "vllm:e2e_request_latency_seconds"


def rate(name: str, by: str = "", where: str = "") -> str:
    """Per second, summed over all processes."""
    return f"sum{f' by ({by}) ' if by else ''}(rate({name}{{{', '.join(filter(None, (M, where)))}}}{I}))"


def quantile(q: float, family: str, by: str = "") -> str:
    return f"histogram_quantile({q}, {rate(f'{family}_bucket', by=', '.join(filter(None, ('le', by))))})"


def mean(family: str) -> str:
    return f"{rate(f'{family}_sum')} / {rate(f'{family}_count')}"


def gauge(name: str, by: str, how: str = "sum") -> str:
    return f"{how} by ({by}) ({name}{{{M}}})"


def quantiles(family: str) -> tuple[tuple[str, str], ...]:
    return (*((f"p{q * 100:g}", quantile(q, family)) for q in (0.5, 0.9, 0.99)), ("mean", mean(family)))


def numbers(title: str, family: str, unit: str, width: int = 3) -> tuple[Panel, ...]:
    """The quantiles and the mean as numbers, as they are now."""
    return tuple(Panel(f"{title} {name}", "number", unit, ((name, expr),), width) for name, expr in quantiles(family))


def latency(title: str, family: str, about: str) -> Row:
    return Row(title, (Panel(title, "lines", "s", quantiles(family), 12, about), *numbers(title, family, "s")))


def lengths(title: str, family: str) -> Row:
    shape = Panel(
        f"{title}: how many of which length", "heatmap", "short", (("{{le}}", rate(f"{family}_bucket", by="le")),), 12
    )
    return Row(title, (shape, *numbers(title, family, "short")))
