"""The passwords and permissions of compose/nats/nats.conf, on a real NATS server: each role may do its part, and no more."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Iterable, Iterator
from pathlib import Path

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error

from splitserve.bus.bus import flush
from splitserve.protocol.subjects import Subjects
from support.processes import ROOT
from support.servers import Server, binary, free_port

CONFIG = ROOT / "compose" / "nats" / "nats.conf"
ROLES = ("router", "prefill", "decode")
SUBJECTS = Subjects("any")
OF_ROUTERS_ALONE = (SUBJECTS.worker_in("decode-a"), SUBJECTS.worker_in("prefill-a"), SUBJECTS.metrics("prefill-a"))
SENDS = {
    "router": (
        *OF_ROUTERS_ALONE,
        SUBJECTS.worker_kv("decode-a"),
        SUBJECTS.worker_lease("prefill-a"),
        SUBJECTS.beat("router", "router-a"),
    ),
    "prefill": (
        SUBJECTS.router_events("router-a"),
        SUBJECTS.worker_kv("decode-a"),
        SUBJECTS.beat("prefill", "prefill-a"),
    ),
    "decode": (
        SUBJECTS.router_events("router-a"),
        SUBJECTS.worker_lease("prefill-a"),
        SUBJECTS.beat("decode", "decode-a"),
    ),
}
HEARS = {
    "router": (SUBJECTS.router_events("router-a"),),
    "prefill": (SUBJECTS.worker_in("prefill-a"), SUBJECTS.worker_lease("prefill-a")),
    "decode": (SUBJECTS.worker_in("decode-a"), SUBJECTS.worker_kv("decode-a")),
}
EVERYBODY_HEARS = (SUBJECTS.all_beats, SUBJECTS.metrics("anybody"))
EVERY_SUBJECT = frozenset(subject for subjects in (*SENDS.values(), *HEARS.values()) for subject in subjects)
QUIET_S = 0.1  # for callbacks of what has come already


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The shipped configuration; only the port is another."""
    folder = tmp_path_factory.mktemp("nats")
    port = free_port()
    config = folder / "nats.conf"
    config.write_text(CONFIG.read_text().replace("listen: 0.0.0.0:4222", f"listen: 127.0.0.1:{port}"))
    passwords = {
        f"NATS_{role.upper()}_PASSWORD": f'"7{role}"' for role in ROLES
    }  # quoted, as docker-compose.yml gives them
    command = ["env", *(f"{key}={value}" for key, value in passwords.items()), binary("nats-server"), "-c", str(config)]
    server = Server(command, port, f"127.0.0.1:{port}")
    server.start()
    yield server
    server.kill()


class Party:
    """A connection of one role, and what the server forbade it."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.client = Client()
        self._told: list[str] = []

    async def connect(self, server: Server, password: str) -> None:
        async def on_error(error: Exception) -> None:
            self._told.append(str(error))

        await self.client.connect(
            f"nats://{self.role}:{password}@{server.url}",
            error_cb=on_error,
            inbox_prefix=f"_INBOX_{self.role}",
            allow_reconnect=False,
        )

    async def forbidden_to_send(self, subjects: Iterable[str]) -> set[str]:
        """Publish on each; those that the server refused."""
        for subject in subjects:
            await self.client.publish(subject, b"")
        return await self._forbidden()

    async def forbidden_to_hear(self, subjects: Iterable[str]) -> set[str]:
        """Subscribe to each; those that the server refused."""
        for subject in subjects:
            await self.client.subscribe(subject)
        return await self._forbidden()

    async def _forbidden(self) -> set[str]:
        await flush(self.client, 5)  # the server answers in order, so all refusals are here; their callbacks run next
        await asyncio.sleep(QUIET_S)
        told, self._told = self._told, []
        found = [re.search(r'permissions violation for \w+ to "(\S+)"', line, re.IGNORECASE) for line in told]
        return {match[1].lower() for match in found if match}


@pytest.fixture
async def parties(server: Server) -> AsyncGenerator[dict[str, Party], None]:
    made = {role: Party(role) for role in ROLES}
    for role, party in made.items():
        await party.connect(server, f"7{role}")
    yield made
    for party in made.values():
        await party.client.close()


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_may_send_and_hear_what_its_part_needs(parties: dict[str, Party], role: str) -> None:
    assert await parties[role].forbidden_to_send(SENDS[role]) == set()
    assert await parties[role].forbidden_to_hear((*HEARS[role], *EVERYBODY_HEARS)) == set()


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_cannot_send_what_is_a_routers_or_another_workers(parties: dict[str, Party], role: str) -> None:
    strange = EVERY_SUBJECT - set(SENDS[role])
    assert strange > set(OF_ROUTERS_ALONE)
    assert await parties[role].forbidden_to_send(strange) == strange


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_hears_neither_tokens_nor_other_roles_answers(parties: dict[str, Party], role: str) -> None:
    strange = {SUBJECTS.router_events("router-a"), *(f"_INBOX_{other}.>" for other in set(ROLES) - {role})}
    assert await parties[role].forbidden_to_hear(strange) == {subject.lower() for subject in strange}


async def test_a_worker_answers_what_it_was_asked(parties: dict[str, Party]) -> None:
    subject = SUBJECTS.worker_in("decode-a")

    async def answer(message: Msg) -> None:
        await message.respond(b"accepted")

    await parties["decode"].client.subscribe(subject, cb=answer)
    await flush(parties["decode"].client, 5)
    reply = await parties["router"].client.request(subject, b"job", timeout=2)
    assert reply.data == b"accepted"
    assert await parties["decode"].forbidden_to_send(()) == set()


@pytest.mark.parametrize("password", ["", "wrong", "7router"])
async def test_a_wrong_password_opens_nothing(server: Server, password: str) -> None:
    party = Party("prefill")
    with pytest.raises(Error, match=r"(?i)authorization violation"):
        await party.connect(server, password)
    await party.client.close()


def test_no_password_stands_in_the_repository() -> None:
    told = [line for line in Path(ROOT, ".env.example").read_text().splitlines() if "PASSWORD" in line and "=" in line]
    assert told
    assert all(line.endswith("_PASSWORD=") for line in told)
    assert "password: $NATS_" in CONFIG.read_text()
