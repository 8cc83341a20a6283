"""What chat and completions do alike once their prompts are ids."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response

from splitserve.errors import SplitserveError, row_of
from splitserve.router.http_errors import ClientGone
from splitserve.router.observe import RequestEnd
from splitserve.router.openai.api import Api
from splitserve.router.openai.respond import Exchange, Job, StreamedAnswer
from splitserve.router.openai.wire import Wire
from splitserve.router.refusals import refusal_reason
from splitserve.router.spans import RequestSpan

Prepare = Callable[[], Awaitable[Job]]  # tokenises; raises SplitserveError


async def generate(api: Api, http: Request, prepare: Prepare, wire: Wire, *, stream: bool) -> Response:
    """Tokenise, run, answer; every way out is reported to the observer once."""
    watch = RequestSpan(
        api.parts.tracer,
        api.parts.observer.request(http.url.path),
        http.state.trace,
        route=getattr(http.scope.get("route"), "path", http.url.path),
        model=api.parts.model_names[0],
        arrived=http.state.arrived,
        stream=stream,
    )
    http.state.trace = watch.trace
    http.state.reported = True
    began = time.monotonic()
    try:
        job = await prepare()
    except SplitserveError as error:
        seconds = time.monotonic() - http.state.arrived
        watch.end(RequestEnd("failed", seconds, row_of(error).code, refusal_reason(error)))
        raise
    except ClientGone:
        watch.end(RequestEnd("cancelled", time.monotonic() - http.state.arrived))
        raise
    tokenise_s = time.monotonic() - began
    watch.tokenised(tokenise_s)
    job = replace(job, submissions=tuple(replace(one, tokenise_s=tokenise_s) for one in job.submissions))
    watch.asked(job)
    exchange = Exchange(job, wire, api.parts.generator, api.parts.tokenizer, watch, api.turn)
    headers = {} if http.state.client_request_id else {"x-request-id": job.rid}
    if stream:
        return StreamedAnswer(exchange, headers, stall_s=api.parts.stall_s)
    answer = await exchange.whole(http.receive)
    answer.headers.update(headers)
    return answer
