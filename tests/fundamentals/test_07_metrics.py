"""**The metrics.** There is one table of series. Each has one owner, so that a sum over all processes is the truth: the
router knows requests and latencies, a worker its engine, a decode worker what it fetched. Names, labels and buckets are
vLLM's where vLLM has the thing. docs/metrics.md tells every series.
"""

from __future__ import annotations

import pytest

from splitserve.protocol.states import Role
from splitserve.telemetry.families import families
from splitserve.telemetry.metrics import Metrics


def metrics(role: Role) -> Metrics:
    return Metrics(role, model_name="toy", engine=f"{role}-0", max_model_len=2048)


def test_each_series_stands_once_in_the_table() -> None:
    names = [family.name for family in families(max_model_len=2048)]
    assert len(names) == len(set(names))


def test_a_series_begins_at_zero_so_that_its_first_event_is_seen_as_a_rise() -> None:
    assert (
        'vllm:generation_tokens_total{engine="router-0",model_name="toy"} 0.0' in metrics(Role.ROUTER).page().decode()
    )


def test_a_process_has_only_the_series_that_it_owns() -> None:
    with pytest.raises(KeyError):
        metrics(Role.PREFILL).counter("vllm:generation_tokens")


def test_tokens_are_counted_where_they_are_delivered() -> None:
    router = metrics(Role.ROUTER)
    router.counter("vllm:generation_tokens").inc(3)
    assert 'vllm:generation_tokens_total{engine="router-0",model_name="toy"} 3.0' in router.page().decode()


def test_buckets_that_count_tokens_end_where_the_model_does() -> None:
    table = {family.name: family for family in families(max_model_len=2048)}
    assert table["vllm:request_prompt_tokens"].buckets[-1] == 2000
