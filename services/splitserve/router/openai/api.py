"""What the endpoints share: the parts, the readers of bodies and prompts, and the way from a request to a job."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from starlette.requests import Request

from splitserve.errors import ModelNotFound
from splitserve.router.generation import Submission
from splitserve.router.openai.respond import Job
from splitserve.router.openai.sampling import answer_tokens, sampling_params, seeds, text_rules
from splitserve.router.openai.schema.fields import GenerationFields
from splitserve.router.openai.schema.reader import FieldReader
from splitserve.router.parts import RouterParts
from splitserve.router.render import Renderer
from splitserve.router.turn import Turn


@dataclass(frozen=True, slots=True)
class AnswerLength:
    """max_tokens as one endpoint has it: the field's name, its value, and what stands for an absent one."""

    field: str
    wanted: int | None
    default: int | None = None  # None: the rest of the context


@dataclass(frozen=True, slots=True)
class Api:
    parts: RouterParts
    renderer: Renderer
    reader: FieldReader
    turn: Turn
    started: int  # wall clock, whole seconds

    def check_model(self, name: str | None) -> str:
        """The name to echo. Raises ModelNotFound."""
        names = self.parts.model_names
        if name is not None and name not in names:
            raise ModelNotFound(f"there is no model {name[:200]!r} here, only {', '.join(names)}", param="model")
        return names[0]

    def job(
        self,
        http: Request,
        request: GenerationFields,
        prompts: Sequence[Sequence[int]],
        *,
        id_prefix: str,
        length: AnswerLength,
        logprobs: int | None,
    ) -> Job:
        """Raises InvalidRequest, ContextTooLong. The first prompt's id is the answer's; the others' follow it."""
        rid = f"{id_prefix}{uuid.uuid4().hex}"
        drawn = seeds(request, self.parts.draw_seed)
        model = self.check_model(request.model)
        options = request.stream_options
        include_stages = bool(request.include_stage_seconds)
        include_usage = include_stages or bool(options and options.include_usage)
        return Job(
            rid=rid,
            model=model,
            created=int(time.time()),
            arrived=cast(float, http.state.arrived),
            submissions=tuple(
                self._submission(http, request, tuple(ids), length, logprobs, rid if n == 0 else f"{rid}-{n}", drawn)
                for n, ids in enumerate(prompts)
            ),
            rules=text_rules(request, self.parts.facts),
            stop_token_ids=frozenset(request.stop_token_ids or ()),
            logprobs=logprobs is not None,
            include_usage=include_usage,
            continuous_usage=include_usage and bool(options and options.continuous_usage_stats),
            include_stages=include_stages,
        )

    def _submission(
        self,
        http: Request,
        request: GenerationFields,
        ids: tuple[int, ...],
        length: AnswerLength,
        logprobs: int | None,
        rid: str,
        drawn: tuple[int, ...],
    ) -> Submission:
        facts = self.parts.facts
        max_tokens = answer_tokens(len(ids), length.wanted, facts, field=length.field, default=length.default)
        return Submission(
            rid=rid,
            model=self.parts.model_names[0],
            ids=ids,
            params=sampling_params(request, facts, max_tokens=max_tokens, logprobs=logprobs),
            seeds=drawn,
            timeout_s=self.parts.routing.request_timeout,
            created=time.time(),
            priority=request.priority or 0,
            cache_salt=request.cache_salt or "",
            client_request_id=http.state.client_request_id or request.request_id or "",
            trace=http.state.trace,
        )


def api_of(request: Request) -> Api:
    return cast(Api, request.app.state.api)
