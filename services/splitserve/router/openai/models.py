"""`GET /v1/models` and `/v1/models/{id}`; ids may hold slashes."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from splitserve.router.openai.api import Api, api_of


async def list_models(http: Request) -> Response:
    """The model under each of its names."""
    api = api_of(http)
    return JSONResponse({"object": "list", "data": [_card(api, name) for name in api.parts.model_names]})


async def get_model(http: Request) -> Response:
    """One of them."""
    api = api_of(http)
    name = str(http.path_params["id"])
    api.check_model(name)
    return JSONResponse(_card(api, name))


def _card(api: Api, name: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": api.started,
        "owned_by": "splitserve",
        "root": api.parts.model_names[0],
        "parent": None,
        "max_model_len": api.parts.facts.max_model_len,
    }
