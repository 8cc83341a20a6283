"""The router's HTTP side as a FastAPI application."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from splitserve.errors import SplitserveError
from splitserve.router.auth import ApiKeys
from splitserve.router.door import Door
from splitserve.router.http_errors import ClientGone, on_client_gone, on_error, on_http_exception
from splitserve.router.openai.api import Api
from splitserve.router.openai.chat import chat_completions
from splitserve.router.openai.completions import completions
from splitserve.router.openai.health import get_version, health, metrics, ready
from splitserve.router.openai.models import get_model, list_models
from splitserve.router.openai.requests import get_request
from splitserve.router.openai.schema.fields import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    RequestModel,
    TokenizeRequest,
)
from splitserve.router.openai.schema.reader import FieldReader
from splitserve.router.openai.tokenize import detokenize, tokenize
from splitserve.router.openai.unserved import embeddings
from splitserve.router.parts import ROUTER_PAGE, RouterParts
from splitserve.router.render import Renderer
from splitserve.router.status.routes import SNAPSHOT, status_routes
from splitserve.router.turn import Turn

Endpoint = Callable[[Request], Awaitable[Response]]

_ROUTES: tuple[tuple[str, str, Endpoint, type[RequestModel] | None], ...] = (
    ("POST", "/v1/chat/completions", chat_completions, ChatRequest),
    ("POST", "/v1/completions", completions, CompletionRequest),
    ("POST", "/v1/embeddings", embeddings, None),
    ("GET", "/v1/models", list_models, None),
    ("GET", "/v1/models/{id:path}", get_model, None),
    ("GET", "/v1/requests/{id}", get_request, None),
    ("POST", "/tokenize", tokenize, TokenizeRequest),
    ("POST", "/detokenize", detokenize, DetokenizeRequest),
    ("GET", "/health", health, None),
    ("GET", "/ready", ready, None),
    ("GET", "/version", get_version, None),
)
_REF = "#/components/schemas/{model}"


def create_app(parts: RouterParts) -> FastAPI:
    """Everything that `parts` needs is opened and closed by the caller: the application has no lifespan.

    Endpoints read their requests themselves: requests go by plain routes, FastAPI's only describe them.

    Raises ModelUnavailable for a malformed chat template.
    """
    app = FastAPI(
        title="splitserve",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={
            SplitserveError: on_error,
            HTTPException: on_http_exception,
            ClientGone: on_client_gone,
        },
    )
    app.root_path = parts.http.root_path.rstrip("/")
    app.state.api = Api(
        parts=parts,
        renderer=Renderer(parts.tokenizer, parts.facts, trust_request_template=parts.trust_request_chat_template),
        reader=FieldReader(strict=parts.http.strict_fields),
        turn=Turn(),
        started=int(time.time()),
    )
    described = APIRouter()
    for method, path, endpoint, body in _ROUTES:
        app.router.routes.append(_Plain(path, endpoint, methods=[method]))
        described.add_api_route(
            path, endpoint, methods=[method], openapi_extra=_documented(path, body), response_model=None
        )
    for path in parts.metrics_pages:
        app.router.routes.append(_Plain(path, metrics, methods=["GET"]))
        described.add_api_route(path, metrics, methods=["GET"], operation_id=f"metrics{path}", response_model=None)
    if parts.status is not None:
        for path, endpoint in status_routes(parts.status).items():
            app.router.routes.append(_Plain(path, endpoint, methods=["GET"]))
            if path == SNAPSHOT:
                described.add_api_route(path, endpoint, methods=["GET"], response_model=None)
    app.add_middleware(Door, keys=ApiKeys(parts.http.api_key), observer=parts.observer)
    origins = [origin.strip() for origin in parts.http.allowed_origins.split(",") if origin.strip()]
    if origins:  # outside of the door: a browser's preflight carries no key
        exposed = ["x-request-id", "retry-after"]
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=exposed
        )
    app.openapi = lambda: _document(app, described)
    return app


class _Plain(Route):
    """A route that the door finds in the scope, as it does FastAPI's."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        return match, {**child, "route": self} if match is not Match.NONE else child


def metrics_app(api: Api) -> Starlette:
    """The router's own port for Prometheus and probes: no API on it, and what is asked of it is counted nowhere."""
    routes = {ROUTER_PAGE: metrics, "/health": health, "/ready": ready}
    app = Starlette(
        routes=[Route(path, endpoint, methods=["GET"]) for path, endpoint in routes.items()],
        exception_handlers={SplitserveError: on_error, HTTPException: on_http_exception},
    )
    app.state.api = api
    return app


def _documented(path: str, body: type[RequestModel] | None) -> dict[str, Any]:
    """What FastAPI cannot see, for endpoints read their requests themselves."""
    extra: dict[str, Any] = {}
    if "{id" in path:
        extra["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
    if body is not None:
        schema = {"$ref": _REF.format(model=body.__name__)}
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return extra


def _document(app: FastAPI, described: APIRouter) -> dict[str, Any]:
    if not app.openapi_schema:
        document = get_openapi(title=app.title, version=app.version, routes=described.routes)
        bodies = [(body, cast(Any, "validation")) for *_, body in _ROUTES if body is not None]
        _, schemas = models_json_schema(bodies, ref_template=_REF)
        document.setdefault("components", {})["schemas"] = schemas["$defs"]
        app.openapi_schema = document
    return app.openapi_schema
