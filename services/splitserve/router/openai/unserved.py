"""Routes of OpenAI that this server knows of and does not have."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from splitserve.errors import NotFound


async def embeddings(_: Request) -> Response:
    """A clear refusal."""
    raise NotFound("this server generates text; it has no embeddings")
