"""The router's spans, made of what its endpoints report and of the records of its requests."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import pytest

from splitserve.protocol.params import SamplingParams
from splitserve.protocol.states import RequestState
from splitserve.protocol.trace import NO_TRACE, TraceContext
from splitserve.router.generation import Submission
from splitserve.router.observe import NullObserver, RequestEnd
from splitserve.router.records import Record
from splitserve.router.spans import GenerationSpans, RequestSpan
from support.spans import CALLER, UNSAMPLED, Memory

SUBMISSION = Submission("r", "m", (1, 2, 3), SamplingParams(max_tokens=9, top_k=5), (1, 2), 60.0, trace=CALLER)


def record(state: RequestState, **changes: object) -> Record:
    made = Record(
        rid="r",
        owner="router-0",
        seq=1,
        state=state,
        model="m",
        pa=1,
        da=1,
        prefill="prefill-0",
        decode="decode-0",
        prompt_len=3,
        n_out=0,
        created=0.0,
        timeout_s=60.0,
    )
    return replace(made, **changes)


@pytest.fixture
def memory() -> Memory:
    return Memory()


def request_span(memory: Memory, caller: TraceContext = CALLER) -> RequestSpan:
    return RequestSpan(
        memory.tracer,
        NullObserver(),
        caller,
        route="/v1/chat/completions",
        model="m",
        arrived=time.monotonic() - 3.0,
        stream=True,
    )


@dataclass(frozen=True)
class Tokenised:
    rid: str = "chatcmpl-1"
    submissions: tuple[Submission, ...] = (SUBMISSION,)


def test_a_request_is_told_in_the_names_of_the_conventions(memory: Memory) -> None:
    span = request_span(memory)
    span.tokenised(0.25)
    span.asked(Tokenised())
    span.first_token(1.0)
    span.end(
        RequestEnd("finished", 3.0, finish_reasons=("stop", "length"), prompt_tokens=(3,), generation_tokens=(4, 5))
    )
    root, tokenise = memory.spans["chat m"], memory.spans["tokenise"]
    assert (root.parent, tokenise.parent) == (CALLER.span_id, root.id)
    assert tokenise.seconds == pytest.approx(0.25, abs=1e-6)
    assert root.seconds == pytest.approx(3.0, abs=0.5)
    assert root.events == {"splitserve.first_token": {}}
    assert root.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "splitserve",
        "gen_ai.request.model": "m",
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 5,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.model": "m",
        "gen_ai.response.finish_reasons": ("stop", "length"),
        "gen_ai.response.time_to_first_chunk": 1.0,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 9,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "splitserve.outcome": "finished",
        "splitserve.prompts": 1,
    }


def test_a_request_that_fails_is_a_failed_span(memory: Memory) -> None:
    request_span(memory).end(RequestEnd("failed", 1.0, "queue_full"))
    assert memory.spans["chat m"].failed
    assert memory.spans["chat m"].attributes["error.type"] == "queue_full"


def test_a_caller_that_does_not_sample_gets_no_span_and_its_trace_goes_on(memory: Memory) -> None:
    span = request_span(memory, UNSAMPLED)
    span.asked(Tokenised())
    span.end(RequestEnd("finished", 1.0))
    assert (span.trace.trace_id, span.trace.sampled) == (UNSAMPLED.trace_id, False)
    assert memory.spans == {}


def test_a_generation_tells_its_places_and_workers_are_told_of_it(memory: Memory) -> None:
    spans = GenerationSpans(memory.tracer)
    told = spans.begin(SUBMISSION, 100.0)
    spans.saved(record(RequestState.QUEUED, decode="", da=0), 100.0)
    spans.saved(record(RequestState.DECODING), 101.0)
    spans.saved(record(RequestState.FINISHED, n_out=7, stages={"place": 0.25, "reserve": 0.5, "e2e": 4.0}), 104.0)
    seen = memory.spans
    assert told == replace(SUBMISSION, trace=told.trace)
    assert told.trace.span_id == seen["generate"].id
    assert seen["generate"].parent == CALLER.span_id
    assert {seen[name].parent for name in ("place", "reserve")} == {seen["generate"].id}
    assert seen["reserve"].start == pytest.approx(seen["place"].end, abs=2_000_000)
    assert (seen["place"].seconds, seen["reserve"].seconds) == (pytest.approx(0.25), pytest.approx(0.5))
    assert seen["generate"].seconds == pytest.approx(4.0, abs=1e-6)
    assert seen["generate"].events == {}
    assert seen["generate"].attributes["gen_ai.usage.output_tokens"] == 7


def test_a_move_to_another_worker_is_an_event_that_names_both(memory: Memory) -> None:
    spans = GenerationSpans(memory.tracer)
    spans.begin(SUBMISSION, 100.0)
    spans.saved(record(RequestState.DECODING), 101.0)
    spans.saved(record(RequestState.PREFILLING, losses=1, n_out=4), 102.0)
    spans.saved(record(RequestState.PREFILLING, losses=1, n_out=4, da=3, pa=2, decode="decode-1"), 103.0)
    spans.saved(record(RequestState.FAILED, losses=1, n_out=6, da=3, pa=2, decode="decode-1", error="x"), 104.0)
    generate = memory.spans["generate"]
    assert generate.events == {
        "splitserve.decode_lost": {"splitserve.decode.worker": "decode-0", "splitserve.output_tokens": 4},
        "splitserve.resume": {
            "splitserve.decode.worker": "decode-1",
            "splitserve.decode.worker.before": "decode-0",
            "splitserve.decode.attempt": 3,
            "splitserve.prefill.attempt": 2,
            "splitserve.output_tokens": 4,
        },
    }
    assert generate.attributes["error.type"] == "x"
    assert generate.attributes["splitserve.workers_lost"] == 1


def test_a_probe_has_no_trace(memory: Memory) -> None:
    spans = GenerationSpans(memory.tracer)
    probe = replace(SUBMISSION, trace=NO_TRACE)
    assert spans.begin(probe, 100.0) == probe
    spans.saved(record(RequestState.FINISHED), 101.0)
    assert memory.spans == {}
