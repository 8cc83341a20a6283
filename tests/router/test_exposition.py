"""Pages are joined as text; what comes out is a page that Prometheus's own parsers read."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from splitserve.router.exposition import OPENMETRICS, TEXT, Page, added, content_type, cut, joined, written

AWKWARD = 'a "quoted" \\ value\nof two lines # HELP x y'


def page_of(engine: str, tokens: int = 3, http: int = 2, *, rejected: str = "") -> str:
    """What a process writes."""
    registry = CollectorRegistry()
    made = Counter("vllm:generation_tokens", 'Tokens "delivered" \\ here.', ["engine", "note"], registry=registry)
    made.labels(engine, AWKWARD).inc(tokens)
    Gauge("vllm:num_requests_running", "Running.", ["engine"], registry=registry).labels(engine).set(1)
    gaps = Histogram("vllm:gap_seconds", "Gaps.", ["engine"], buckets=(0.5, 2), registry=registry)
    for _ in range(tokens):
        gaps.labels(engine).observe(1)
    Counter("http_requests", "Requests.", ["status"], registry=registry).labels("2xx").inc(http)
    Summary("http_request_size_bytes", "Sizes.", registry=registry).observe(http)
    rejections = Counter("vllm:admission_rejections", "Rejections.", ["reason"], registry=registry)
    if rejected:
        rejections.labels(rejected).inc()
    return generate_latest(registry).decode()


def samples(page: Page) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    found = {}
    for family in text_string_to_metric_families(written(page, TEXT).decode()):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} stands on the page twice"
            found[key] = sample.value
    return found


def test_a_page_that_is_cut_and_written_is_the_same_page() -> None:
    text = page_of("d0")
    assert written(cut(text), TEXT).decode() == text


def test_an_empty_text_is_an_empty_page() -> None:
    assert cut("") == {}
    assert written({}, TEXT) == b""


@pytest.mark.parametrize("text", ["# HELP a b\na 1\n", "# HELP a b\n# TYPE c counter\na 1\n"])
def test_a_family_without_its_type_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="'a' has no TYPE"):
        cut(text)


def test_pages_are_joined_family_by_family_with_one_help_and_type_each() -> None:
    text = written(joined([cut(page_of("d0")), cut(page_of("d1"))]), TEXT).decode()
    for name in ("vllm:generation_tokens_total", "vllm:num_requests_running", "vllm:gap_seconds"):
        assert text.count(f"# HELP {name} ") == text.count(f"# TYPE {name} ") == 1
    found = samples(joined([cut(page_of("d0")), cut(page_of("d1"))]))
    assert {dict(labels)["engine"] for (name, labels) in found if name == "vllm:num_requests_running"} == {"d0", "d1"}


def test_series_without_an_engine_are_added_for_they_are_the_same_at_every_router() -> None:
    found = samples(joined([cut(page_of("r0", http=2)), cut(page_of("r1", http=5)), cut(page_of("r2", http=1))]))
    assert found["http_requests_total", (("status", "2xx"),)] == 8
    assert found["http_request_size_bytes_sum", ()] == 8
    assert found["http_request_size_bytes_count", ()] == 3


def test_a_gauge_without_an_engine_is_a_share_and_shown_as_the_mean() -> None:
    pages = [cut(f'# HELP old o\n# TYPE old gauge\nold{{m="x"}} {share}\n') for share in (0.25, 0.75, 0.5)]
    assert samples(joined(pages)) == {("old", (("m", "x"),)): 0.5}
    assert joined(pages[:1]) == pages[0]


def test_a_family_that_is_still_empty_at_one_router_is_the_others() -> None:
    found = samples(joined([cut(page_of("r0")), cut(page_of("r1", rejected="queue_full"))]))
    assert found["vllm:admission_rejections_total", (("reason", "queue_full"),)] == 1


def test_a_family_of_another_type_is_left_out_the_first_stands() -> None:
    other = "# HELP vllm:num_requests_running No gauge.\n# TYPE vllm:num_requests_running counter\n"
    found = joined([cut(page_of("d0")), cut(other + 'vllm:num_requests_running{engine="d1"} 9\n')])
    assert found["vllm:num_requests_running"].kind == "gauge"
    assert "d1" not in found["vllm:num_requests_running"].samples


def test_a_base_is_added_series_by_series_buckets_too() -> None:
    old, new = cut(page_of("d0", tokens=4)), cut(page_of("d0", tokens=3))
    gaps = added(new["vllm:gap_seconds"], old["vllm:gap_seconds"].values())
    assert gaps.values()['vllm:gap_seconds_bucket{engine="d0",le="0.5"}'] == 0
    assert gaps.values()['vllm:gap_seconds_bucket{engine="d0",le="+Inf"}'] == 7
    assert gaps.values()['vllm:gap_seconds_sum{engine="d0"}'] == 7
    assert samples({"g": gaps})  # still a page


def test_series_that_only_the_base_has_stay() -> None:
    new = cut(page_of("r0"))["vllm:admission_rejections_total"]
    base = cut(page_of("r0", rejected="queue_full"))["vllm:admission_rejections_total"]
    assert added(new, base.values()).samples == base.samples


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", TEXT),
        ("*/*", TEXT),
        ("text/plain;version=0.0.4", TEXT),
        ("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2", OPENMETRICS),
    ],
)
def test_who_takes_openmetrics_gets_it(accept: str, kind: str) -> None:
    assert content_type(accept) == kind


def test_openmetrics_reads_as_the_same_samples() -> None:
    page = joined([cut(page_of("d0")), cut(page_of("r1", rejected="queue_full"))])
    text = written(page, OPENMETRICS).decode()
    assert text.endswith("# EOF\n")
    read = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in openmetrics_families(text)
        for sample in family.samples
    }
    assert read == {key: value for key, value in samples(page).items() if not key[0].endswith("_created")}
