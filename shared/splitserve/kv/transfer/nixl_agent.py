"""One nixl agent over UCX: registers memory, reads another agent's memory, ends.

nixl has no way to call a transfer back: released or cut off, it may still write when its peer wakes up (seen with a
stopped owner over tcp). Only the end of the agent ends its writes. So a reader has an agent for each owner, and a
transfer that stalls costs that one agent.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from splitserve.errors import ConfigError, Unreachable
from splitserve.kv.transfer.threads import Stop

_IDLE_US = 100_000  # nixl's own thread sleeps so long unless UCX wakes it; with 0, NVIDIA's default, it spins
_POLL_S = 20e-6
_CANCEL_S = 0.2  # what a transfer gets to end by itself when nobody wants it any more

Places = npt.NDArray[np.uint64]  # a row a piece: address, bytes, 0 (the device)


class Stalled(Unreachable):
    """The agent is of no use any more: end it, then its memory is written no more."""


def load_nixl() -> Any:
    """NVIDIA's bindings, by which also the pauses of nixl's thread can be set. ConfigError without the wheel."""
    raised = logging.raiseExceptions
    try:
        return importlib.import_module("nixl_cu12._bindings")
    except ImportError as error:
        raise ConfigError(
            f"--kv-transport nixl needs the package nixl-cu12 ({error}): pip install 'splitserve[nixl]'"
        ) from error
    finally:
        logging.raiseExceptions = raised  # its import turns them off for the whole process


class Agent:
    """`serves`: others read from it, so nixl's own thread answers those transports of UCX that need an answer.

    Use it from one thread at a time, and close it when nothing uses it.
    """

    def __init__(self, nixl: Any, name: str, *, serves: bool) -> None:
        settings = nixl.nixlAgentConfig()
        settings.useProgThread = serves
        settings.pthrDelay = _IDLE_US
        settings.useListenThread = False
        settings.captureTelemetry = False
        settings.syncMode = nixl.NIXL_THREAD_SYNC_STRICT
        self._nixl = nixl
        self._agent: Any = nixl.nixlAgent(name, settings)
        self._ucx = [self._agent.createBackend("UCX", {})]

    @property
    def open(self) -> bool:
        return self._agent is not None

    @property
    def metadata(self) -> bytes:
        """What another agent must know to read the memory registered so far."""
        return self._agent.getLocalMD()

    def register(self, address: int, size: int) -> None:
        """Let this memory be read, or read into, until the agent is closed. Keep it alive so long."""
        places = self._nixl.nixlRegDList(self._nixl.DRAM_SEG, [(address, size, 0, "")])
        self._agent.registerMem(places, self._ucx)

    def connect(self, metadata: bytes) -> str:
        """The name of the agent that the metadata is of. Unreachable when nixl refuses it."""
        try:
            return self._agent.loadRemoteMD(metadata).decode()
        except Exception as error:  # every status of nixl is an exception class of its own
            raise Unreachable(f"nixl does not take the owner's metadata: {error}") from error

    def read(self, peer: str, source: Places, target: Places, silence_s: float, stop: Stop) -> None:
        """Copy each row of `source`, the peer's memory, to that row of `target`, ours. Blocking.

        Unreachable when the peer is gone; Stalled when the copy did not end within `silence_s`, or soon after being
        told to stop.
        """
        nixl, agent = self._nixl, self._agent
        kind = nixl.DRAM_SEG
        try:
            request = agent.createXferReq(
                nixl.NIXL_READ, nixl.nixlXferDList(kind, target), nixl.nixlXferDList(kind, source), peer, "", self._ucx
            )
            state = agent.postXferReq(request, "")
            began = time.monotonic()
            while state == nixl.NIXL_IN_PROG:
                waited = time.monotonic() - began
                if waited > silence_s or (waited > _CANCEL_S and stop.told):
                    raise Stalled(f"{peer}: a nixl read did not end within {waited:.1f} s")
                time.sleep(_POLL_S)
                state = agent.getXferStatus(request)
            agent.releaseXferReq(request)
        except Unreachable:
            raise
        except Exception as error:  # as above
            raise Stalled(f"{peer}: nixl cannot read from it: {error}") from error
        if state != nixl.NIXL_SUCCESS:
            raise Stalled(f"{peer}: a nixl read ended with {state}")

    def close(self) -> None:
        """End it, with its threads, files and whatever is under way; safe to repeat."""
        self._agent = None


def places(pieces: Sequence[tuple[int, int]]) -> Places:
    """(address, bytes) of each piece."""
    rows = np.zeros((len(pieces), 3), np.uint64)
    rows[:, :2] = pieces
    return rows


def address_of_buffer(buffer: memoryview) -> int:
    return np.frombuffer(buffer, np.uint8).ctypes.data
