"""From a JSON object to a request model, or to an InvalidRequest that names the field."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TypeVar, cast

from pydantic import ValidationError

from splitserve.errors import InvalidRequest, UnsupportedField
from splitserve.router.body import Body
from splitserve.router.openai.schema.fields import NESTED, RequestModel
from splitserve.router.openai.schema.known import IGNORED, Accepted

log = logging.getLogger("splitserve.router")

_MOST_NAMES = 1000  # unknown names remembered; a client that makes them up fills no memory
M = TypeVar("M", bound=RequestModel)


class FieldReader:
    """Reads bodies for all endpoints of one router: it remembers which unknown fields the log has named."""

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict
        self._named: set[str] = set()

    def read(self, model: type[M], body: Body, accepted: Accepted) -> M:
        """Raises InvalidRequest, or UnsupportedField for a known field whose value would change the answer."""
        unknown = [name for name in body if name not in model.model_fields and name not in IGNORED]
        for name in unknown:
            if name in accepted:
                _check(name, body[name], accepted)
        self._report([name for name in unknown if name not in accepted])
        for field, inner in NESTED.items():
            given = body.get(field)
            names = cast(Body, given) if isinstance(given, dict) and field in model.model_fields else ()
            self._report([f"{field}.{name}" for name in names if name not in inner.model_fields])
        try:
            return model.model_validate(body)
        except ValidationError as error:
            raise _refusal(error) from None

    def _report(self, names: Iterable[str]) -> None:
        for name in names:
            if self._strict:
                raise InvalidRequest(f"unknown field {name[:80]!r} (--strict-fields)", param=name[:80])
            if name not in self._named and len(self._named) < _MOST_NAMES:
                self._named.add(name)
                log.warning("unknown request field ignored", extra={"field": name[:80]})


def _check(name: str, value: object, accepted: Accepted) -> None:
    if value is None or value in accepted[name]:
        return
    neutral = " or ".join(repr(one) for one in (None, *accepted[name]))
    raise UnsupportedField(f"{name} is not supported yet: leave it out, or send {neutral}", param=name)


def _refusal(error: ValidationError) -> InvalidRequest:
    """The first fault; the path has a dot between its parts, as OpenAI writes it."""
    fault = error.errors(include_url=False, include_context=False)[0]
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "missing":
        return InvalidRequest(f"{path} is missing", param=path)
    shown = repr(fault["input"])
    return InvalidRequest(f"{path}: {fault['msg']}, not {shown if len(shown) <= 60 else shown[:60] + '…'}", param=path)
