"""Metrics against the log of the client that made the load: what moved, what it adds up to, and that it never falls."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

from splitserve.protocol.states import Role
from splitserve.telemetry import buckets
from splitserve.telemetry.families import Family, Kind, Series, families
from splitserve.telemetry.legacy import LEGACY
from splitserve.telemetry.metrics import OWNED
from splitserve.telemetry.own import GAP_STAGES
from support.metrics_watch import bucket_of, quantile_bucket, total
from support.promtool import complaints
from support.truth import FLEET, Part, Story, told

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(600)]

SAMPLE = {Kind.COUNTER: "_total", Kind.GAUGE: "", Kind.HISTOGRAM: "_count", Kind.SUMMARY: "_count"}
TABLE = families(8192)


@pytest.fixture(scope="module")
def story(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    return told(tmp_path_factory.mktemp("truth"), smollm2_folder)


def owners(family: Family, story: Story) -> list[str]:
    """The processes that have it to show."""
    roles = [role for role in Role if family.owner in OWNED[role]]
    return [who for who in story.watch.highest if who.startswith(tuple(roles)) and who != FLEET]


def highest(family: Family, series: Series, story: Story) -> list[float]:
    """The highest value of a series at each of its owners; NaN where it is missing."""
    labels = dict(zip(family.labels, series.values, strict=True))
    found: list[float] = []
    for who in owners(family, story):
        page = story.watch.highest[who]
        matching = [v for (n, ls), v in page.items() if n == family.name + SAMPLE[family.kind] and labels.items() <= dict(ls).items()]  # fmt: skip
        found.append(max(matching, default=float("nan")))
    return found


def test_every_series_of_every_owner_is_exported_from_the_start(story: Story) -> None:
    missing = [
        (family.name, series.values, who)
        for family in TABLE
        for series in family.known
        for who in owners(family, story)
        if not any(n == family.name + SAMPLE[family.kind] and set(zip(family.labels, series.values)) <= set(ls)
                   for n, ls in story.start[who])
    ]  # fmt: skip
    assert not missing, "\n".join(map(str, missing))


def test_every_series_moved_or_is_constant_or_rare_by_the_table(story: Story) -> None:
    still = [
        (family.name, series.values)
        for family in TABLE
        for series in family.known
        if not series.constant and not series.rare and not any(v > 0 for v in highest(family, series, story))
    ]
    assert not still, "\n".join(map(str, still))


def test_families_whose_series_come_with_events_have_some(story: Story) -> None:
    pages = list(story.watch.highest.values())
    empty = [f.name for f in TABLE if not f.known and not total(pages, f.name + SAMPLE[f.kind])]
    assert not empty, "\n".join(map(str, empty))


def test_a_constant_has_its_value(story: Story) -> None:
    for family in TABLE:
        for series in family.known:
            if series.constant:
                assert set(highest(family, series, story)) == {series.value}, (family.name, series.values)


def test_a_page_has_no_family_that_is_not_in_the_table(story: Story) -> None:
    known = {family.name for family in TABLE} | {legacy.name for legacy in LEGACY}
    stems = {name + suffix for name in known for suffix in ("", "_total", "_count", "_sum", "_bucket")}
    for who, page in story.watch.highest.items():
        others = {name for name, _ in page} - stems
        assert {name for name in others if not name.startswith(("process_", "python_"))} == set(), who


def test_probes_and_warm_up_are_counted_nowhere(story: Story) -> None:
    pages = [page for who, page in story.start.items() if who != FLEET]
    for name in (
        "vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total",
        "vllm:time_to_first_token_seconds_count", "vllm:iteration_tokens_total_count", "vllm:prefix_cache_queries_total",
        "vllm:external_prefix_cache_queries_total", "splitserve_kv_transfer_bytes_total", "splitserve_prefill_tokens_total",
        "splitserve_stage_seconds_count", "splitserve_placements_total", "http_requests_total",
    ):  # fmt: skip
        assert total(pages, name) == 0, name


@pytest.mark.parametrize("which", ["streams", "mixed", "killed"])
def test_tokens_and_requests_equal_the_clients_log(story: Story, which: str) -> None:
    part: Part = getattr(story, which)
    log = part.log
    assert part.rose("vllm:prompt_tokens_total") == log.prompt_tokens
    assert part.rose("vllm:prompt_tokens_by_source_total") == log.prompt_tokens
    assert part.rose("vllm:prompt_tokens_cached_total") == log.cached_tokens
    assert part.rose("vllm:prompt_tokens_by_source_total", source="local_cache_hit") == log.cached_tokens
    assert part.rose("vllm:prompt_tokens_cached_by_source_total") == log.cached_tokens
    assert part.rose("vllm:generation_tokens_total") == log.generation_tokens
    assert part.rose("vllm:request_generation_tokens_sum") == log.generation_tokens
    assert {r: part.rose("vllm:request_success_total", finished_reason=r) for r in ("stop", "length")} == {
        r: log.finished[r] for r in ("stop", "length")
    }
    assert part.rose("vllm:request_params_n_count") == log.requests


@pytest.mark.parametrize("which", ["streams", "mixed"])
def test_workers_count_each_token_once_where_it_is_computed(story: Story, which: str) -> None:
    part: Part = getattr(story, which)
    log = part.log
    computed = log.prompt_tokens - log.cached_tokens
    assert part.rose("splitserve_prefill_tokens_total") == computed
    assert part.rose("vllm:prefix_cache_queries_total") == log.prompt_tokens
    assert part.rose("vllm:prefix_cache_hits_total") == log.cached_tokens
    assert part.rose("vllm:iteration_tokens_total_sum") == computed + part.rose("splitserve_decode_tokens_total")
    first_tokens = sum(log.finished.values())
    ahead = part.rose("splitserve_decode_tokens_total") - (log.generation_tokens - first_tokens)
    assert 0 <= ahead <= 4 * log.finished["stop"]  # the router finds a stop string when the worker is already further
    asked = part.rose("vllm:external_prefix_cache_queries_total")
    assert 0 < asked <= log.prompt_tokens
    assert part.rose("vllm:external_prefix_cache_hits_total") == asked


def test_the_fleet_page_says_the_same_as_all_others_together(story: Story) -> None:
    fleet = story.killed.after[FLEET]
    # a killed worker's last counts are on the fleet page and nowhere else: only the router's can be compared to the token
    others = [page for who, page in story.killed.after.items() if who != FLEET]
    for name in ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total",
                 "vllm:time_to_first_token_seconds_count", "http_requests_total"):  # fmt: skip
        assert total([fleet], name) == total(others, name), name


def test_refusals_and_clients_that_left_are_counted_by_reason(story: Story) -> None:
    part = story.rough
    refused = {
        reason: part.rose("splitserve_requests_refused_total", reason=reason)
        for reason in ("context_length_exceeded", "model_not_found", "invalid_value", "unsupported_value",
                       "body_too_large", "invalid_api_key")
    }  # fmt: skip
    assert refused == dict.fromkeys(refused, 1)
    assert part.log.refused[429] > 0
    assert part.rose("splitserve_requests_refused_total", reason="max_num_queued_reqs") == part.log.refused[429]
    assert part.rose("vllm:admission_rejections_total", reason="max_num_queued_reqs") == part.log.refused[429]
    assert part.rose("splitserve_requests_cancelled_total") == story.left
    assert part.rose("vllm:request_success_total", finished_reason="abort") == story.left
    assert part.rose("vllm:request_success_total", finished_reason="length") == part.log.finished["length"]


@pytest.mark.parametrize("q", [0.5, 0.9])
def test_the_routers_latencies_lie_within_a_bucket_of_the_clients(story: Story, q: float) -> None:
    part = story.streams
    before, after = part.before["router-0"], part.after["router-0"]
    for family, bounds, seen in (
        ("vllm:time_to_first_token_seconds", buckets.TTFT, part.log.ttfts),
        ("vllm:inter_token_latency_seconds", buckets.GAP, part.log.gaps),
    ):
        ours, theirs = quantile_bucket(before, after, family, q), bucket_of(seen, bounds, q)
        assert abs(ours - theirs) <= 1, (family, ours, theirs)
    assert part.rose("vllm:time_to_first_token_seconds_count") == len(part.log.ttfts)


def test_the_stages_add_up_and_other_is_small(story: Story) -> None:
    part = story.streams

    def stages(*names: str) -> float:
        return sum(part.rose("splitserve_stage_seconds_sum", stage=name) for name in names)

    ttft = stages("tokenise", "place", "reserve", "prefill_bus", "prefill_queue", "prefill", "other", "detokenise")
    assert ttft == pytest.approx(part.rose("vllm:time_to_first_token_seconds_sum"), rel=0.01)
    assert median(one["other"] / one["ttft"] for one in part.log.stages) < 0.05
    gap = stages(*GAP_STAGES)
    # decode may hear of the KV some milliseconds before the router does, and begins then
    assert gap == pytest.approx(part.rose("splitserve_first_gap_seconds_sum"), rel=0.05)


def test_a_killed_worker_shows_as_a_replacement_and_no_counter_of_the_fleet_falls(story: Story) -> None:
    assert story.killed.rose("splitserve_replacements_total", phase="decode", reason="worker_lost") >= 1
    assert story.watch.fell == []
    assert story.watch.reads[FLEET] > 20


def test_older_names_carry_the_models_name_alone(story: Story) -> None:
    for legacy in LEGACY:
        found = [(n, dict(ls)) for page in story.start.values() for n, ls in page if n.startswith(legacy.name)]
        assert found, legacy.name
        assert all(set(labels) <= {"model_name", "le"} for _, labels in found)


def test_promtool_has_nothing_to_say_of_any_page(story: Story) -> None:
    assert {who: complaints(text) for who, text in story.texts.items()} == {who: [] for who in story.texts}
