"""The passwords and permissions of compose/nats/nats.conf, on a real NATS server: each role may do its part, and no more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error

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
QUIET_S = 0.2  # a violation is told within a round trip


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
        self.refused: list[str] = []

    async def connect(self, server: Server, password: str) -> None:
        async def on_error(error: Exception) -> None:
            self.refused.append(str(error).lower())

        await self.client.connect(
            f"nats://{self.role}:{password}@{server.url}",
            error_cb=on_error,
            inbox_prefix=f"_INBOX_{self.role}",
            allow_reconnect=False,
        )

    async def may(self) -> bool:
        """Whether the server let pass all that was done since the last call."""
        await self.client.flush()
        await asyncio.sleep(QUIET_S)
        refused, self.refused = self.refused, []
        return not any("permissions violation" in told for told in refused)


@pytest.fixture
async def parties(server: Server) -> AsyncGenerator[dict[str, Party], None]:
    made = {role: Party(role) for role in ROLES}
    for role, party in made.items():
        await party.connect(server, f"7{role}")
    yield made
    for party in made.values():
        await party.client.close()


async def _may_publish(party: Party, subject: str) -> bool:
    await party.client.publish(subject, b"")
    return await party.may()


async def _may_subscribe(party: Party, subject: str) -> bool:
    await party.client.subscribe(subject)
    return await party.may()


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_may_send_and_hear_what_its_part_needs(parties: dict[str, Party], role: str) -> None:
    for subject in SENDS[role]:
        assert await _may_publish(parties[role], subject), subject
    for subject in (*HEARS[role], *EVERYBODY_HEARS):
        assert await _may_subscribe(parties[role], subject), subject


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_cannot_send_what_is_a_routers(parties: dict[str, Party], role: str) -> None:
    for subject in OF_ROUTERS_ALONE:
        assert not await _may_publish(parties[role], subject), subject


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_sends_nothing_but_its_own_part(parties: dict[str, Party], role: str) -> None:
    for subject in EVERY_SUBJECT - set(SENDS[role]):
        assert not await _may_publish(parties[role], subject), subject
    for other in set(ROLES) - {role}:
        assert not await _may_publish(parties[role], SUBJECTS.beat(other, "a")), "a beat in another role's name"


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_hears_neither_tokens_nor_other_roles_answers(parties: dict[str, Party], role: str) -> None:
    assert not await _may_subscribe(parties[role], SUBJECTS.router_events("router-a"))
    for other in set(ROLES) - {role}:
        assert not await _may_subscribe(parties[role], f"_INBOX_{other}.>")


async def test_a_worker_answers_what_it_was_asked(parties: dict[str, Party]) -> None:
    subject = SUBJECTS.worker_in("decode-a")

    async def answer(message: Msg) -> None:
        await message.respond(b"accepted")

    await parties["decode"].client.subscribe(subject, cb=answer)
    await parties["decode"].client.flush()
    reply = await parties["router"].client.request(subject, b"job", timeout=2)
    assert reply.data == b"accepted"
    assert await parties["decode"].may()


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
