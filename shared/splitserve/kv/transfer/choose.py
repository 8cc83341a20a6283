"""Which ways lead from this worker to another's pool, best first. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from splitserve.protocol.handle import KvAddress

_ONE_HOST = frozenset({"shm", "cuda_ipc"})


@dataclass(frozen=True, slots=True)
class Way:
    """A transport to try, or (`usable` false) why not to."""

    transport: str
    usable: bool
    why: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The transport taken for a worker, and the reason in words."""

    worker: str
    transport: str
    why: str


def ways(addresses: Iterable[KvAddress], transports: Iterable[str], forced: str, host: str) -> tuple[Way, ...]:
    """Judge the addresses in their order (most preferred first). `forced` is "auto" or the only transport allowed;
    `host` our boot id: memory is shared only with the same one."""
    ours = frozenset(transports)
    return tuple(_judge(address, ours, forced, host) for address in addresses)


def _judge(address: KvAddress, transports: frozenset[str], forced: str, host: str) -> Way:
    name = address.transport
    if name not in transports:
        return Way(name, False, f"{name} is not known here")
    if forced not in ("auto", name):
        return Way(name, False, f"--kv-transport={forced}")
    if name in _ONE_HOST and address.host != host:
        return Way(name, False, f"{name} needs one host, the owner is on another")
    return Way(name, True, "same host" if name in _ONE_HOST else "offered by the owner")
