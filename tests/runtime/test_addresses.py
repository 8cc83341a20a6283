from __future__ import annotations

from pathlib import Path

import pytest

from splitserve.errors import ConfigError
from splitserve.runtime.addresses import address_of, write_address


def test_a_url_is_itself() -> None:
    assert address_of("nats://127.0.0.1:4222", "--nats") == "nats://127.0.0.1:4222"


def test_a_file_gives_the_url_that_was_written_to_it_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "nats"
    write_address(path, "nats://u:p@127.0.0.1:1")
    assert path.stat().st_mode & 0o777 == 0o600
    assert address_of(f"@{path}", "--nats") == "nats://u:p@127.0.0.1:1"


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nats"
    path.write_text("nats://u:p@h:1")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=r"--nats: .*0644.*0600"):
        address_of(f"@{path}", "--nats")


@pytest.mark.parametrize(("value", "says"), [("", "is missing"), ("@/no/such/file", "cannot read")])
def test_a_missing_address_names_the_flag(value: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"--redis.*{says}"):
        address_of(value, "--redis")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nats"
    write_address(path, "")
    with pytest.raises(ConfigError, match="is empty"):
        address_of(f"@{path}", "--nats")
