"""Transport `nixl`, the owner's end: registers the segment with an agent and tells readers where it lies.

Reading is one-sided after that. Whoever gets the card can read the whole pool, as by shm; no token guards a block.
"""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import Executor
from contextlib import suppress
from uuid import uuid4

from splitserve.kv.segment import Segment
from splitserve.kv.transfer.nixl_agent import Agent, address_of_buffer, load_nixl
from splitserve.kv.transfer.nixl_card import Card
from splitserve.kv.transfer.server import Acceptor, listening


class NixlServer:
    """`host` is an address to hand cards out at, `port` 0 a free one. The bytes go over whatever UCX finds best."""

    def __init__(self, segment: Segment, executor: Executor, host: str, port: int) -> None:
        self._segment = segment
        self._executor = executor
        self._host = host
        self._port = port
        self._agent: Agent | None = None
        self._acceptor: Acceptor | None = None
        self._card = b""

    async def start(self) -> int:
        """Register the pool and listen; returns the port. ConfigError, PortTaken."""
        await asyncio.get_running_loop().run_in_executor(self._executor, self._register)
        listener = listening(self._host, self._port)
        self._acceptor = Acceptor(listener, self._serve, "nixl")
        return int(listener.getsockname()[1])

    @property
    def readers(self) -> int:
        """Processes that hold the card."""
        return self._acceptor.connections if self._acceptor else 0

    async def close(self) -> None:
        if self._acceptor is not None:
            await self._acceptor.close()
        if self._agent is not None:
            self._agent.close()

    def _register(self) -> None:
        """In a thread: UCX looks at all the machine's devices first, which takes some tenths of a second."""
        segment = self._segment
        self._agent = agent = Agent(load_nixl(), f"owner-{uuid4().hex}", serves=True)
        generations = address_of_buffer(segment.generations.cast("B"))
        pool = address_of_buffer(segment.pool)
        agent.register(generations, pool + len(segment.pool) - generations)  # one mapping: tables, then the pool
        self._card = Card(
            incarnation=segment.incarnation,
            layout=segment.layout_digest,
            blocks=segment.blocks,
            block_bytes=segment.block_bytes,
            checksummed=segment.header.checksummed,
            pool=pool,
            generations=generations,
            checksums=address_of_buffer(segment.checksums.cast("B")),
            metadata=agent.metadata,
        ).encode()

    async def _serve(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a reader's host may vanish
        with suppress(ConnectionError, TimeoutError):
            await loop.sock_sendall(connection, self._card)
            await loop.sock_recv(connection, 1)
