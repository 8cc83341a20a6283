from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from splitserve.config import TransferSettings
from splitserve.prefill.service import socket_dir


async def test_the_socket_lies_in_the_folder_told_which_is_made_private(tmp_path: Path) -> None:
    told = tmp_path / "a" / "b"
    async with AsyncExitStack() as stack:
        assert socket_dir(TransferSettings(kv_socket_dir=str(told)), stack) == told
    assert told.stat().st_mode & 0o777 == 0o700


async def test_a_worker_on_its_own_has_a_private_folder_that_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    async with AsyncExitStack() as stack:
        folder = socket_dir(TransferSettings(), stack)
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()
