"""The router's own series: requests, where they are. Children are resolved once; a token costs one `observe`."""

from __future__ import annotations

from collections.abc import Callable

from splitserve.protocol.states import Role
from splitserve.router.observe import RequestEnd
from splitserve.telemetry.metrics import Metrics


class RouterMetrics:
    """One reader of what the endpoints report (`observe.Observer`), and the page."""

    def __init__(self, *, model_name: str, engine: str, max_model_len: int) -> None:
        self.metrics = metrics = Metrics(Role.ROUTER, model_name=model_name, engine=engine, max_model_len=max_model_len)
        self._ttft = metrics.histogram("vllm:time_to_first_token_seconds")
        self._gap = metrics.histogram("vllm:inter_token_latency_seconds")
        self._per_token = metrics.histogram("vllm:request_time_per_output_token_seconds")
        self._e2e = metrics.histogram("vllm:e2e_request_latency_seconds")
        self._queue = metrics.histogram("vllm:request_queue_time_seconds")
        self._prefill = metrics.histogram("vllm:request_prefill_time_seconds")
        self._decode = metrics.histogram("vllm:request_decode_time_seconds")
        self._inference = metrics.histogram("vllm:request_inference_time_seconds")
        self._prompt_tokens = metrics.counter("vllm:prompt_tokens")
        self._cached_tokens = metrics.counter("vllm:prompt_tokens_cached")
        self._generation_tokens = metrics.counter("vllm:generation_tokens")
        self._request_prompt = metrics.histogram("vllm:request_prompt_tokens")
        self._request_generation = metrics.histogram("vllm:request_generation_tokens")
        self._n = metrics.histogram("vllm:request_params_n")
        self._max_tokens = metrics.histogram("vllm:request_params_max_tokens")
        self._success = {
            reason: metrics.counter("vllm:request_success", finished_reason=reason) for reason in ("stop", "length")
        }
        self.refresh: Callable[[], None] = lambda: None

    # --- observe.Observer ---

    def request(self, endpoint: str) -> RouterMetrics:
        return self

    def tokenised(self, seconds: float) -> None:
        """Part of the stages that `end` brings."""

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def gap(self, seconds: float) -> None:
        self._gap.observe(seconds)

    def answered(self, method: str, path: str, status: int, seconds: float) -> None:
        """HTTP series come with the full metrics set."""

    def end(self, end: RequestEnd) -> None:
        self._generation_tokens.inc(sum(end.generation_tokens))
        if end.first_token_s is not None:
            self._prompt_tokens.inc(sum(end.prompt_tokens))
            self._cached_tokens.inc(end.cached_tokens)
        if end.outcome == "failed":
            self.metrics.counter("splitserve_requests_failed", code=end.code or "internal_error").inc()
        elif end.outcome == "cancelled":
            state = "prefilling" if end.first_token_s is None else "decoding"
            self.metrics.counter("splitserve_requests_cancelled", state=state).inc()
        else:
            self._finished(end)

    def _finished(self, end: RequestEnd) -> None:
        for reason in end.finish_reasons:
            self._success[reason].inc()
        for tokens in end.prompt_tokens:
            self._request_prompt.observe(tokens)
        for tokens in end.generation_tokens:
            self._request_generation.observe(tokens)
        self._n.observe(end.n)
        self._max_tokens.observe(end.max_tokens)
        self._e2e.observe(end.seconds)
        if end.first_token_s is None or end.last_token_s is None:
            return
        decode = end.last_token_s - end.first_token_s
        queue = sum(stage.get("prefill_queue", 0.0) for stage in end.stages)
        prefill = sum(stage.get("prefill", 0.0) for stage in end.stages)
        self._queue.observe(queue)
        self._prefill.observe(prefill)
        self._decode.observe(decode)
        self._inference.observe(prefill + decode)
        longest = max(end.generation_tokens, default=0)
        if longest > 1:
            self._per_token.observe(decode / (longest - 1))

    def page(self) -> bytes:
        """This router's own series, as text; what is read off at that moment (`gauges`) is brought up to date first."""
        self.refresh()
        return self.metrics.page()
