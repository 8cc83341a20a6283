"""Segments: real memory, real file descriptors, a real second process where one is needed."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from splitserve.errors import KvMismatch, NotEnoughMemory
from splitserve.kv.segment import PAGE, Header, Segment, SegmentView

LAYOUT = "a layout"
LIFE = 0xFEED_F00D_1234_5678


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment.create(blocks=10, block_bytes=1000, layout_digest=LAYOUT, incarnation=LIFE)
    yield made
    made.close()


def test_the_parts_are_page_aligned_zeroed_and_of_the_right_shape(segment: Segment) -> None:
    assert (segment.generations.format, len(segment.generations)) == ("Q", 10)
    assert (segment.checksums.format, len(segment.checksums)) == ("Q", 10)
    assert (segment.pool.format, len(segment.pool)) == ("B", 10_000)
    header = segment.header
    assert [at % PAGE for at in (header.generations_at, header.checksums_at, header.pool_at)] == [0, 0, 0]
    assert not any(segment.pool)
    assert not any(segment.generations)


def test_a_reader_sees_what_the_owner_writes(segment: Segment) -> None:
    view = SegmentView.attach(segment.fd, LAYOUT, LIFE)
    view.prefault()
    segment.pool[9_999] = 77
    segment.generations[9] = 1 << 63
    segment.checksums[0] = 5
    assert (view.pool[9_999], view.generations[9], view.checksums[0]) == (77, 1 << 63, 5)
    view.close()
    view.close()


@pytest.mark.parametrize(
    ("layout", "life", "factor"), [("another layout", LIFE, "layout"), (LAYOUT, LIFE + 1, "incarnation")]
)
def test_a_reader_that_expects_something_else_is_told_the_factor(
    segment: Segment, layout: str, life: int, factor: str
) -> None:
    with pytest.raises(KvMismatch, match=f"^{factor}:"):
        SegmentView.attach(segment.fd, layout, life)


@pytest.mark.parametrize(
    ("spoil", "factor"),
    [
        (lambda raw: b"X" + raw[1:], "magic"),
        (lambda raw: raw[:8] + b"\x63" + raw[9:], "version"),
        (lambda raw: raw, "size"),
        (lambda raw: b"", "magic"),
    ],
)
def test_a_file_that_is_no_whole_segment_is_refused(
    tmp_path: Path, segment: Segment, spoil: Callable[[bytes], bytes], factor: str
) -> None:
    path = tmp_path / "not a segment"
    path.write_bytes(spoil(segment.header.pack()))
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(KvMismatch, match=f"^{factor}:"):
            SegmentView.attach(fd, LAYOUT, LIFE)
    finally:
        os.close(fd)


def test_a_header_survives_its_page(segment: Segment) -> None:
    for header in (segment.header, replace(segment.header, checksummed=True)):
        assert Header.read(header.pack()) == header


def test_the_readers_memory_is_read_only(segment: Segment) -> None:
    view = SegmentView.attach(segment.fd, LAYOUT, LIFE)
    assert view.pool.readonly
    with pytest.raises(TypeError):
        view.pool[0] = 1
    view.close()


@pytest.mark.skipif(sys.platform != "linux", reason="seals are Linux'")
def test_whoever_has_the_descriptor_can_neither_write_nor_resize_the_pool(segment: Segment) -> None:
    fd = os.open(f"/proc/self/fd/{segment.fd}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(fd, PAGE, flags=mmap.MAP_SHARED)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        for size in (0, segment.header.size * 2):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
    finally:
        os.close(fd)


def test_numpy_over_the_pool_does_not_keep_close_from_working(segment: Segment) -> None:
    import numpy as np

    view = SegmentView.attach(segment.fd, LAYOUT, LIFE)
    segment.pool[3] = 9
    looking = np.frombuffer(view.pool, np.uint8)
    view.close()
    view.close()
    assert looking[3] == 9


def test_a_pool_that_the_system_has_no_room_for_is_one_clear_line() -> None:
    with pytest.raises(NotEnoughMemory, match="--kv-cache-memory-bytes"):
        Segment.create(1 << 20, 1 << 40, LAYOUT, LIFE)


@pytest.mark.parametrize(("blocks", "block_bytes"), [(0, 8), (8, 0), (-1, 8)])
def test_an_empty_pool_is_refused(blocks: int, block_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"{blocks} blocks of {block_bytes} bytes"):
        Segment.create(blocks, block_bytes, LAYOUT, LIFE)


TENSOR_OUTLIVES_SEGMENT = """
import gc, torch
from splitserve.kv.segment import Segment
segment = Segment.create(4, 4096, "layout", 1)
tensor = torch.frombuffer(segment.pool, dtype=torch.float32)
tensor.fill_(2.0)
segment.close(); del segment; gc.collect()
assert tensor.sum().item() == 2.0 * 4096
print("read after close")
"""


def test_a_tensor_over_the_pool_outlives_the_segment_and_the_exit_is_quiet() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", TENSOR_OUTLIVES_SEGMENT],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "read after close", "")


def test_nothing_stays_open(segment: Segment) -> None:
    before = set(os.listdir("/proc/self/fd")) if sys.platform == "linux" else set[str]()
    other = Segment.create(2, 8, LAYOUT, LIFE)
    view = SegmentView.attach(other.fd, LAYOUT, LIFE)
    view.close()
    other.close()
    other.close()
    del other, view
    after = set(os.listdir("/proc/self/fd")) if sys.platform == "linux" else set[str]()
    assert after == before
