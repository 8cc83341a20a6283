"""A router's status over HTTP. It knows nothing of the cluster but one URL."""

from __future__ import annotations

import http.client
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from pydantic import TypeAdapter, ValidationError

from splitserve.errors import ConfigError, NeverReady
from splitserve.protocol.status import Snapshot

TIMEOUT_S = 5.0
_SNAPSHOT = TypeAdapter(Snapshot)


def status_url(url: str) -> str:
    """Where the status of the router at `url` lies. Raises ConfigError for what is no HTTP URL."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{url!r} is no URL of a router: give http://HOST:PORT")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}/status.json"


def fetch(url: str, key: str) -> Snapshot:
    """Ask once. Raises NeverReady when nobody answers, ConfigError when the answer is no status."""
    headers = {"accept": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    try:
        with urlopen(
            Request(url, headers=headers), timeout=TIMEOUT_S
        ) as answer:  # status_url admits http and https only
            return _SNAPSHOT.validate_json(answer.read())
    except HTTPError as error:
        raise _refused(url, error.code, bool(key)) from error
    except ValidationError as error:
        raise ConfigError(f"{url} answers, but not with the status of this version of splitserve") from error
    except (URLError, OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise NeverReady(f"no router answers at {url}: {reason}") from error


def _refused(url: str, status: int, with_key: bool) -> ConfigError | NeverReady:
    if status == 401:
        return ConfigError(f"{url} {'does not take that key' if with_key else 'asks for a key'}: give --api-key")
    if status == 404:
        return ConfigError(f"there is no {url}: is it a router, and without --no-status-page?")
    return NeverReady(f"{url} answers with status {status}")
