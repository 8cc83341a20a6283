"""Types of request fields, and the fields that chat and completions share, with their exact ranges.

Validation is strict: a string is no number, a bool no integer. Ranges are vLLM's, narrower only where a value could
make an infinity of a logit. Every field takes null as "not given".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

MAX_STOPS = 64
MAX_STOP_CHARS = 4096
MAX_N = 128
MAX_LOGPROBS = 20
MAX_BIASES = 4096
_INT64 = 1 << 63


def _whole(value: object) -> object:
    """5.0 is an integer in JSON, as in JavaScript."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _bias_keys(value: dict[str, float]) -> dict[str, float]:
    bad = next((key for key in value if not key.isdecimal() or not key.isascii() or len(key) > 9), None)
    if bad is not None:
        raise ValueError(f"keys are token ids, {bad[:40]!r} is none")
    return value


Whole = Annotated[int, BeforeValidator(_whole), WithJsonSchema({"type": "integer"})]
TokenId = Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=1 << 31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
    Field(max_length=MAX_STOPS),
    BeforeValidator(_as_list),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


class RequestModel(BaseModel):
    """A request body, or an object in one. Names that it does not have are the reader's matter, not pydantic's."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, protected_namespaces=())


class StreamOptions(RequestModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # OpenAI's padding against who measures sizes; nothing is padded here


NESTED: Mapping[str, type[RequestModel]] = {"stream_options": StreamOptions}  # fields that are objects with fields


class GenerationFields(RequestModel):
    """What both endpoints take."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Whole | None = Field(default=None, ge=1, le=MAX_N)
    max_tokens: Whole | None = Field(default=None, ge=1)
    min_tokens: Whole | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: Whole | None = Field(default=None, ge=-1, le=_INT64 - 1, description="0 and -1: all tokens")
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES), AfterValidator(_bias_keys)] | None = None
    seed: Whole | None = Field(default=None, ge=-_INT64, le=_INT64 - 1)
    stop: Stops | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    priority: Whole | None = Field(default=None, ge=-(1 << 31), lt=1 << 31, description="lower is earlier")
    cache_salt: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^@/\\\x00]+$")] | None = None
    request_id: Annotated[str, Field(max_length=200)] | None = None
    user: str | None = None
    include_stage_seconds: bool | None = Field(default=None, description="usage tells where the time went")


class ChatRequest(GenerationFields):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Whole | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Annotated[Any, WithJsonSchema({"enum": ["none", "auto", None]})] = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


_PROMPT: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer", "minimum": 0}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0}}},
    ]
}


class CompletionRequest(GenerationFields):
    """`POST /v1/completions`."""

    prompt: Annotated[Any, WithJsonSchema(_PROMPT)]
    logprobs: Whole | None = Field(default=None, ge=0, le=MAX_LOGPROBS)


class TokenizeRequest(RequestModel):
    """`POST /tokenize`: a prompt, or messages that are rendered first."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(RequestModel):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId]
