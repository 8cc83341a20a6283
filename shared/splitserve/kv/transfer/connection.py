"""A reader's connection to an owner by the network."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from dataclasses import dataclass

from splitserve.errors import Unreachable


@dataclass(frozen=True, slots=True, eq=False)
class Connection:
    socket: socket.socket
    address: str

    def shut(self) -> None:
        with suppress(OSError):  # the peer may have been quicker
            self.socket.shutdown(socket.SHUT_RDWR)

    def alive(self) -> bool:
        """An idle connection has nothing to read; its end, or a stray byte, makes it useless."""
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False


async def connect(address: str, limit_s: float) -> Connection:
    """To `host:port`. Unreachable."""
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(limit_s):
            found = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
            family, kind, protocol, _, where = found[0]
            connection = socket.socket(family, kind, protocol)
            try:
                connection.setblocking(False)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await loop.sock_connect(connection, where)
            except BaseException:
                connection.close()
                raise
    except TimeoutError as error:
        raise Unreachable(f"no connection to {address} within {limit_s:g} s") from error
    except (OSError, ValueError) as error:
        raise Unreachable(f"no connection to {address}: {error}") from error
    return Connection(connection, address)
