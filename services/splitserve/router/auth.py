"""API keys: a bearer token on every route but those that probes read and the status page's shell, which holds no data."""

from __future__ import annotations

from hmac import compare_digest

from starlette.datastructures import Headers

from splitserve.errors import AuthenticationFailed
from splitserve.router.status.routes import SHELL

_OPEN = frozenset({"/health", "/ready", "/version", "/metrics", "/metrics/router", *SHELL})


class ApiKeys:
    """The keys of `--api-key`, comma-separated; none means that everybody may enter."""

    def __init__(self, keys: str) -> None:
        self._keys = [key.strip().encode() for key in keys.split(",") if key.strip()]

    def check(self, path: str, headers: Headers) -> None:
        """Raises AuthenticationFailed. Takes the same time whichever key is nearly right."""
        if not self._keys or path in _OPEN:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip().encode("latin-1")
        if scheme.lower() != "bearer" or not given:
            raise AuthenticationFailed("no API key: send the header Authorization: Bearer KEY")
        if not sum(compare_digest(given, key) for key in self._keys):  # a sum: it compares with all of them
            raise AuthenticationFailed("the API key is wrong")
