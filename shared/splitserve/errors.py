"""Every error of splitserve: one tree, one root, one table.

    SplitserveError
    ├── RequestError                what a client sent or asked for (answered with a 4xx)
    │   ├── InvalidRequest          a field is wrong; `param` names it
    │   │   ├── UnsupportedField    known, but its value is not served yet
    │   │   └── ContextTooLong      the prompt does not fit the model; both numbers are in the message
    │   ├── AuthenticationFailed
    │   ├── NotFound
    │   │   └── ModelNotFound
    │   ├── MethodNotAllowed
    │   └── BodyTooLarge
    ├── Overloaded                  refused now, welcome later (`retry_after_s`)
    ├── Unavailable                 a part of the cluster is away (`retry_after_s`)
    │   ├── BusUnavailable
    │   ├── StoreUnavailable
    │   ├── NoWorkers
    │   └── Draining
    ├── RequestFailed               accepted, then lost for good
    │   ├── DeadlineExceeded
    │   ├── LossBudgetSpent         too many workers died under one request
    │   └── EngineFailed
    ├── ProtocolError               a message that is not ours, or not for this life
    │   ├── BadMessage
    │   ├── UnknownMessage
    │   └── MessageTooLarge
    ├── KvError                     a handle that cannot be turned into blocks
    │   ├── Fenced                  the block's generation moved
    │   ├── Unreachable
    │   ├── KvMismatch              layout, model or version differ; the factor is named
    │   └── ChecksumMismatch
    └── StartupError                one clear line and an exit code, never a traceback
        ├── ConfigError
        ├── PortTaken
        ├── NotEnoughMemory
        ├── ModelUnavailable
        ├── UnsupportedModel
        ├── DependencyMissing
        └── NeverReady

A message says what was wrong, with both numbers, and what to do about it. `TABLE` is the only place
where a class meets its wire code, its HTTP status and its exit code; `tests/test_errors.py` proves it complete.
"""

from __future__ import annotations

from dataclasses import dataclass


class SplitserveError(Exception):
    """Root of the tree. `message` is meant for a person; `param` names the field at fault, if any."""

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class RequestError(SplitserveError):
    """The client's side is at fault; the same request will fail again."""


class InvalidRequest(RequestError):
    """A field is missing, malformed or out of range."""


class UnsupportedField(InvalidRequest):
    """A known field whose value would change the answer, and which is not served yet."""


class ContextTooLong(InvalidRequest):
    """Prompt and answer together exceed the model's context."""


class AuthenticationFailed(RequestError):
    """No API key, or a wrong one."""


class NotFound(RequestError):
    """No such route or object."""


class ModelNotFound(NotFound):
    """No worker serves a model of that name."""


class MethodNotAllowed(RequestError):
    """The route exists, the method does not."""


class BodyTooLarge(RequestError):
    """The body, or the message made of it, is over a limit."""


class Overloaded(SplitserveError):
    """No room now; `retry_after_s` says when to come back."""


class Unavailable(SplitserveError):
    """A part of the cluster is away."""


class BusUnavailable(Unavailable):
    """NATS cannot be reached."""


class StoreUnavailable(Unavailable):
    """Redis cannot be reached, and this request needs it."""


class NoWorkers(Unavailable):
    """No live worker can serve this request; the message names the reason."""


class Draining(Unavailable):
    """The service is leaving and takes nothing new."""


class RequestFailed(SplitserveError):
    """An accepted request that could not be finished."""


class DeadlineExceeded(RequestFailed):
    """The request's own time is over."""


class LossBudgetSpent(RequestFailed):
    """More workers died under this request than it may cost."""


class EngineFailed(RequestFailed):
    """A step of the engine raised; the log has the traceback under the request id."""


class ProtocolError(SplitserveError):
    """A message that cannot be served; it is answered and counted."""


class BadMessage(ProtocolError):
    """Bytes that are no envelope, or a head whose fields do not validate."""


class UnknownMessage(ProtocolError):
    """A kind or version that this build does not know."""


class MessageTooLarge(ProtocolError):
    """Over the bus server's max_payload; raised before it is sent, with both sizes."""


class KvError(SplitserveError):
    """A handle cannot be turned into readable blocks."""


class Fenced(KvError):
    """A block was given to other content after the handle was made."""


class Unreachable(KvError):
    """The owner's data plane does not answer."""


class KvMismatch(KvError):
    """Fingerprints differ; the message names the factor (protocol, model, dtype, layout, rope)."""


class ChecksumMismatch(KvError):
    """The bytes are not the bytes that were sent."""


class StartupError(SplitserveError):
    """The process cannot start. Printed as one line; the exit code stands in `TABLE`."""


class ConfigError(StartupError):
    """A flag or an environment variable is wrong."""


class PortTaken(StartupError):
    """Another process listens there."""


class NotEnoughMemory(StartupError):
    """Weights or KV pool do not fit."""


class ModelUnavailable(StartupError):
    """No such model, no network, no room, or a folder without weights."""


class UnsupportedModel(StartupError):
    """The load gate refused the architecture; the message names model and cause."""


class DependencyMissing(StartupError):
    """NATS, Redis or a package cannot be found; the message says what to install."""


class NeverReady(StartupError):
    """A service or a server did not become ready in its time."""


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """One line of the table: `code` is stable on the bus, in Redis and in OpenAI's `error.code`."""

    error: type[SplitserveError]
    code: str
    http_status: int
    openai_type: str = "server_error"
    exit_code: int = 1


_REQUEST = "invalid_request_error"

TABLE: tuple[ErrorRow, ...] = (
    ErrorRow(SplitserveError, "internal_error", 500),
    ErrorRow(RequestError, "bad_request", 400, _REQUEST),
    ErrorRow(InvalidRequest, "invalid_value", 400, _REQUEST),
    ErrorRow(UnsupportedField, "unsupported_value", 400, _REQUEST),
    ErrorRow(ContextTooLong, "context_length_exceeded", 400, _REQUEST),
    ErrorRow(AuthenticationFailed, "invalid_api_key", 401, "authentication_error"),
    ErrorRow(NotFound, "not_found", 404, _REQUEST),
    ErrorRow(ModelNotFound, "model_not_found", 404, _REQUEST),
    ErrorRow(MethodNotAllowed, "method_not_allowed", 405, _REQUEST),
    ErrorRow(BodyTooLarge, "body_too_large", 413, _REQUEST),
    ErrorRow(Overloaded, "overloaded", 429, "rate_limit_error"),
    ErrorRow(Unavailable, "unavailable", 503, "service_unavailable"),
    ErrorRow(BusUnavailable, "bus_unavailable", 503, "service_unavailable"),
    ErrorRow(StoreUnavailable, "store_unavailable", 503, "service_unavailable"),
    ErrorRow(NoWorkers, "no_workers", 503, "service_unavailable"),
    ErrorRow(Draining, "draining", 503, "service_unavailable"),
    ErrorRow(RequestFailed, "request_failed", 500),
    ErrorRow(DeadlineExceeded, "deadline_exceeded", 504, "timeout_error"),
    ErrorRow(LossBudgetSpent, "loss_budget_spent", 500),
    ErrorRow(EngineFailed, "engine_failed", 500),
    ErrorRow(ProtocolError, "protocol_error", 500),
    ErrorRow(BadMessage, "bad_message", 500),
    ErrorRow(UnknownMessage, "unknown_message", 500),
    ErrorRow(MessageTooLarge, "message_too_large", 413, _REQUEST),
    ErrorRow(KvError, "kv_error", 500),
    ErrorRow(Fenced, "fenced", 500),
    ErrorRow(Unreachable, "unreachable", 500),
    ErrorRow(KvMismatch, "mismatch", 500),
    ErrorRow(ChecksumMismatch, "checksum", 500),
    ErrorRow(StartupError, "startup_failed", 500, exit_code=1),
    ErrorRow(ConfigError, "config_error", 500, exit_code=2),
    ErrorRow(PortTaken, "port_taken", 500, exit_code=3),
    ErrorRow(NotEnoughMemory, "not_enough_memory", 500, exit_code=4),
    ErrorRow(ModelUnavailable, "model_unavailable", 500, exit_code=5),
    ErrorRow(UnsupportedModel, "unsupported_model", 500, exit_code=6),
    ErrorRow(DependencyMissing, "dependency_missing", 500, exit_code=7),
    ErrorRow(NeverReady, "never_ready", 500, exit_code=8),
)

_BY_CLASS = {row.error: row for row in TABLE}
_BY_CODE = {row.code: row for row in TABLE}


def row_of(error: SplitserveError | type[SplitserveError]) -> ErrorRow:
    """The table row of an error or class; a room's own subclass has the row of its nearest ancestor in the tree."""
    kind = error if isinstance(error, type) else type(error)
    return next(_BY_CLASS[base] for base in kind.__mro__ if base in _BY_CLASS)


def error_from_code(code: str, message: str) -> SplitserveError:
    """The error that a wire code stands for; an unknown code (a newer peer) gives the root."""
    row = _BY_CODE.get(code)
    return (row.error if row else SplitserveError)(message)
