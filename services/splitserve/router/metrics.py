"""The router's own series: requests, where they are. Children are resolved once; a token costs one `observe`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from splitserve.errors import SplitserveError
from splitserve.protocol.states import Role
from splitserve.router.http_metrics import HttpMetrics
from splitserve.router.observe import HttpAnswer, Progress, RequestEnd
from splitserve.router.refusals import AT_THE_DOOR, refusal_reason
from splitserve.router.stages import breakdown, first_read, gap_breakdown
from splitserve.telemetry.metrics import Metrics, Tally
from splitserve.telemetry.own import GAP_STAGES, TTFT_STAGES


class RouterMetrics:
    """One reader of what the endpoints report (`observe.Observer`), and the page."""

    def __init__(self, *, model_name: str, engine: str, max_model_len: int, legacy: bool = False) -> None:
        self.metrics = metrics = Metrics(
            Role.ROUTER, model_name=model_name, engine=engine, max_model_len=max_model_len, legacy=legacy
        )
        self.ends = EndMetrics(metrics)
        self.ttft = metrics.histogram("vllm:time_to_first_token_seconds")
        self.gap = Tally(metrics.histogram("vllm:inter_token_latency_seconds"))
        self._tokens = TokenMetrics(metrics)
        self._http = HttpMetrics(metrics)
        self.refresh: Callable[[], None] = lambda: None

    # --- observe.Observer ---

    def request(self, endpoint: str) -> RequestMetrics:
        return RequestMetrics(self)

    def refused(self, error: SplitserveError) -> None:
        self.ends.refused(refusal_reason(error))

    def answered(self, answer: HttpAnswer) -> None:
        self._http.answered(answer)

    def gaps(self, seconds: Sequence[float]) -> None:
        for gap in seconds:
            self.gap.observe(gap)

    def progressed(self, by: Progress) -> None:
        self._tokens.progressed(by)

    # --- the page ---

    def page(self) -> bytes:
        """This router's own series, as text; what is read off at that moment (`gauges`) is brought up to date first."""
        self._refresh()
        return self.metrics.page()

    def answer(self, accept: str) -> tuple[bytes, str]:
        """The same as this process's own page, with what is known of the process (`Metrics.answer`)."""
        self._refresh()
        return self.metrics.answer(accept)

    def _refresh(self) -> None:
        self.refresh()
        self.gap.refresh()


class RequestMetrics:
    """One request (`observe.RequestReader`)."""

    __slots__ = ("_of", "_tokenise_s")

    def __init__(self, of: RouterMetrics) -> None:
        self._of = of
        self._tokenise_s = 0.0

    def tokenised(self, seconds: float) -> None:
        self._tokenise_s = seconds

    def first_token(self, seconds: float) -> None:
        self._of.ttft.observe(seconds)

    def end(self, end: RequestEnd) -> None:
        self._of.ends.end(end, self._tokenise_s)


class EndMetrics:
    """What is known of a request at its end."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._per_token = metrics.histogram("vllm:request_time_per_output_token_seconds")
        self._e2e = metrics.histogram("vllm:e2e_request_latency_seconds")
        self._queue = metrics.histogram("vllm:request_queue_time_seconds")
        self._prefill = metrics.histogram("vllm:request_prefill_time_seconds")
        self._decode = metrics.histogram("vllm:request_decode_time_seconds")
        self._inference = metrics.histogram("vllm:request_inference_time_seconds")
        self._request_prompt = metrics.histogram("vllm:request_prompt_tokens")
        self._request_generation = metrics.histogram("vllm:request_generation_tokens")
        self._longest = metrics.histogram("vllm:request_max_num_generation_tokens")
        self._computed = metrics.histogram("vllm:request_prefill_kv_computed_tokens")
        self._preemptions = metrics.histogram("vllm:request_num_preemptions")
        self._n = metrics.histogram("vllm:request_params_n")
        self._max_tokens = metrics.histogram("vllm:request_params_max_tokens")
        self._stages = StageMetrics(metrics)

    def end(self, end: RequestEnd, tokenise_s: float) -> None:
        self._stages.end(end, tokenise_s)
        unfinished = len(end.generation_tokens) - len(end.finish_reasons)
        for reason in end.finish_reasons:
            self._ended(reason)
        if end.refused:
            self.refused(end.refused)
        elif end.outcome == "failed":
            self._ended("error", unfinished)
            self._metrics.counter("splitserve_requests_failed", code=end.code).inc()
        elif end.outcome == "cancelled":
            self._ended("abort", unfinished)
        else:
            self._finished(end)

    def refused(self, reason: str) -> None:
        self._metrics.counter("splitserve_requests_refused", reason=reason).inc()
        if reason in AT_THE_DOOR:
            self._metrics.counter("vllm:admission_rejections", reason=reason).inc()

    def _ended(self, reason: str, answers: int = 1) -> None:
        self._metrics.counter("vllm:request_success", finished_reason=reason).inc(answers)

    def _finished(self, end: RequestEnd) -> None:
        for tokens in end.prompt_tokens:
            self._request_prompt.observe(tokens)
        for tokens in end.generation_tokens:
            self._request_generation.observe(tokens)
        longest = max(end.generation_tokens, default=0)
        self._longest.observe(longest)
        self._computed.observe(sum(end.prompt_tokens) - end.cached_tokens)
        self._preemptions.observe(end.preemptions)
        self._n.observe(end.n)
        self._max_tokens.observe(end.max_tokens)
        self._e2e.observe(end.seconds)
        if end.first_token_s is None or end.last_token_s is None:
            return
        decode = end.last_token_s - end.first_token_s
        first = first_read(end.stages)  # prompts of one request are read side by side: their sum is nobody's time
        queue, prefill = first.get("prefill_queue", 0.0), first.get("prefill", 0.0)
        self._queue.observe(queue)
        self._prefill.observe(prefill)
        self._decode.observe(decode)
        self._inference.observe(prefill + decode)
        if longest > 1:
            self._per_token.observe(decode / (longest - 1))


class TokenMetrics:
    """Tokens that went in and out, as they do: of every prompt that got a token, however its request ends."""

    def __init__(self, metrics: Metrics) -> None:
        self._generation = metrics.counter("vllm:generation_tokens")
        self._prompt = metrics.counter("vllm:prompt_tokens")
        self._cached = metrics.counter("vllm:prompt_tokens_cached")
        self._computed = metrics.counter("vllm:prompt_tokens_by_source", source="local_compute")
        self._hit = metrics.counter("vllm:prompt_tokens_by_source", source="local_cache_hit")
        self._device = metrics.counter("vllm:prompt_tokens_cached_by_source", source="device")

    def progressed(self, by: Progress) -> None:
        self._generation.inc(by.generated)
        self._prompt.inc(by.prompt)
        self._computed.inc(by.prompt - by.cached)
        for counter in (self._cached, self._hit, self._device):
            counter.inc(by.cached)


class StageMetrics:
    """Where the time to the first token went, and where that to the second did when the KV was moved."""

    def __init__(self, metrics: Metrics) -> None:
        stages = (*TTFT_STAGES, *GAP_STAGES)
        self._stages = {s: metrics.histogram("splitserve_stage_seconds", stage=s).observe for s in stages}
        self._first_gap = metrics.histogram("splitserve_first_gap_seconds").observe

    def end(self, end: RequestEnd, tokenise_s: float) -> None:
        if end.first_token_s is None or not end.stages:
            return
        self._observe(
            breakdown(
                end.stages,
                tokenise_s=tokenise_s,
                detokenise_s=end.detokenise_s,
                first_token_s=end.first_token_s,
            )
        )
        for stages in end.stages:
            gap = gap_breakdown(stages)
            if gap:
                self._first_gap(stages["first_gap"])
                self._observe(gap)

    def _observe(self, stages: Mapping[str, float]) -> None:
        for stage, seconds in stages.items():
            self._stages[stage](seconds)
