"""What chat and completions do alike once their prompts are ids."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from splitserve.errors import SplitserveError, row_of
from splitserve.router.http_errors import ClientGone
from splitserve.router.observe import RequestEnd
from splitserve.router.openai.api import Api
from splitserve.router.openai.respond import Exchange, Job, StreamedAnswer
from splitserve.router.openai.wire import Wire
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
    began = time.monotonic()
    try:
        job = await prepare()
    except (SplitserveError, ClientGone) as error:
        code = row_of(error).code if isinstance(error, SplitserveError) else ""
        watch.end(RequestEnd("failed" if code else "cancelled", time.monotonic() - http.state.arrived, code))
        raise
    watch.tokenised(time.monotonic() - began)
    exchange = Exchange(job, wire, api.parts.generator, api.parts.tokenizer, watch)
    headers = {} if http.state.client_request_id else {"x-request-id": job.rid}
    if stream:
        return StreamedAnswer(exchange, headers, stall_s=api.parts.stall_s)
    answer = await exchange.whole(http.receive)
    watch.asked(job)
    answer.headers.update(headers)
    return answer
