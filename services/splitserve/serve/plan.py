"""What `splitserve serve` starts, as data: names, commands, environments. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from splitserve.config import Group, RouterSettings, ServeProcessSettings, WorkerProcessSettings
from splitserve.serve.child import Spec, python
from splitserve.serve.cores import CoreShare
from splitserve.worker.lending import Lending

_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_ANYWHERE = {"", "0.0.0.0", "::"}
_SPINS = "20000"  # of an OpenMP thread at a barrier: spans those within a step, gone before a given-back core is missed
_JOINING = (
    *("dtype", "max_model_len", "block_size", "device", "cluster", "kv_transport", "kv_checksum"),
    "otlp_traces_endpoint",
)


@dataclass(frozen=True, slots=True)
class Given:
    """What is known only once the start is under way. `nats` and `redis` are URLs or `@FILE`, as flags take them."""

    folder: Path
    served_name: str
    nats: str
    redis: str
    sockets: Path
    port: int
    pool_bytes: int  # of each worker; 0: its own choice
    log_format: str
    page: Path | None = None  # of lent cores; none: no lending
    suffix: str = ""  # makes names unique on a bus that is not ours alone


def worker_specs(settings: ServeProcessSettings, given: Given, shares: Sequence[CoreShare]) -> list[Spec]:
    """One spec a worker, prefill first; `shares` in the same order."""
    roles = [(role, n) for role, count in _counts(settings) for n in range(count)]
    base = _environment(_groups(settings, WorkerProcessSettings)) | _common(given)
    base["SPLITSERVE_KV_SOCKET_DIR"] = str(given.sockets)
    base["SPLITSERVE_KV_PORT"] = base["SPLITSERVE_METRICS_PORT"] = "0"
    base["SPLITSERVE_GPU_MEMORY_UTILIZATION"] = f"{settings.engine.gpu_memory_utilization / len(roles):.4f}"
    if given.pool_bytes:
        base["SPLITSERVE_KV_CACHE_MEMORY_BYTES"] = str(given.pool_bytes)
    cores = tuple(share.cpus for share in shares)
    specs: list[Spec] = []
    for row, ((role, n), share) in enumerate(zip(roles, shares, strict=True)):
        name = f"{role}-{given.suffix}{n}"
        own, cpus = {"SPLITSERVE_THREADS": str(share.threads), "OMP_NUM_THREADS": str(share.threads)}, share.cpus
        if given.page and all(cores):
            own["SPLITSERVE_LENDING"] = Lending(given.page, row, settings.serve.prefill, cores).text()
            own["GOMP_SPINCOUNT"] = _SPINS
            cpus = ()  # it pins itself (`worker/engine_cores`)
        specs.append(Spec(name, python("-m", "splitserve", role, "--name", name), base | own, cpus))
    return specs


def front_cpus(settings: ServeProcessSettings, shares: Sequence[CoreShare]) -> tuple[int, ...]:
    """Where the router, NATS and Redis run: beside prefill, for what they take from a decode worker is taken from every
    token. Empty, anywhere, where workers are not pinned or none is for prefill."""
    prefill = shares[: settings.serve.prefill]
    return tuple(cpu for share in prefill for cpu in share.cpus)


def router_spec(settings: ServeProcessSettings, given: Given, cpus: tuple[int, ...] = ()) -> Spec:
    name = f"router-{given.suffix}0"
    env = _environment(_groups(settings, RouterSettings)) | _common(given)
    env["SPLITSERVE_PORT"] = str(given.port)
    if settings.serve.prefill == 0:
        env["SPLITSERVE_SPLIT"] = "never"
    return Spec(name, python("-m", "splitserve", "router", "--name", name), env, cpus)


def url_of(host: str, port: int) -> str:
    """Where a client on this machine finds the router."""
    name = "localhost" if host in _LOOPBACK | _ANYWHERE else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"


def is_open(host: str) -> bool:
    """Whether others than this machine may reach it."""
    return host not in _LOOPBACK and not host.startswith("127.")


def curl_line(url: str, model: str, key: str) -> str:
    """One line to paste into a shell."""
    body = (
        f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Why is the sky blue?"}}], "max_tokens": 64}}'
    )
    secret = f" -H {shlex.quote(f'Authorization: Bearer {key}')}" if key else ""
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{secret} -d {shlex.quote(body)}"


def join_line(settings: ServeProcessSettings, given: Given, role: str = "decode") -> str:
    """The command with which one more worker joins, from another terminal of this machine."""
    groups = _groups(settings, WorkerProcessSettings)
    told = [
        f"--{name.replace('_', '-')} {shlex.quote(str(getattr(group, name)))}"
        for group in groups
        for name, field in type(group).model_fields.items()
        if name in _JOINING and getattr(group, name) != field.default
    ]
    model = f"--model {shlex.quote(str(given.folder))} --served-model-name {shlex.quote(given.served_name)}"
    return " ".join([f"splitserve {role} --nats {given.nats} {model}", *told])


def _counts(settings: ServeProcessSettings) -> tuple[tuple[str, int], ...]:
    return (("prefill", settings.serve.prefill), ("decode", settings.serve.decode))


def _common(given: Given) -> dict[str, str]:
    return {
        "SPLITSERVE_MODEL": str(given.folder),
        "SPLITSERVE_SERVED_MODEL_NAME": given.served_name,
        "SPLITSERVE_NATS": given.nats,
        "SPLITSERVE_REDIS": given.redis,
        "SPLITSERVE_LOG_FORMAT": given.log_format,
    }


def _groups(settings: ServeProcessSettings, process: type[RouterSettings | WorkerProcessSettings]) -> list[Group]:
    return [getattr(settings, field.name) for field in fields(process)]


def _environment(groups: Iterable[Group]) -> dict[str, str]:
    """Every field, also those at their default: the child must not see another value in what it inherits."""
    return {
        f"SPLITSERVE_{name.upper()}": str(value).lower() if isinstance(value, bool) else str(value)
        for group in groups
        for name, value in group.model_dump().items()
    }
