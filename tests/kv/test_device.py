"""A pool in a device's memory: its ring of buffers, tried over a CUDA runtime whose copies really come late."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import closing

import pytest

from splitserve.errors import DependencyMissing, EngineFailed, NotEnoughMemory
from splitserve.kv import cuda as cuda_module
from splitserve.kv.cuda import Cuda
from splitserve.kv.device import DeviceMemory
from support.fake_cuda import FakeRuntime
from support.waiting import until

SIZE = 64
BLOCKS = 40


@pytest.fixture
def runtime() -> Generator[FakeRuntime]:
    """Late enough that a wait that is left out shows; everything must have been given back."""
    made = FakeRuntime(delay_s=0.002)
    yield made
    assert made.left == (0, 0, 0)


@pytest.fixture
def memory(runtime: FakeRuntime) -> Generator[DeviceMemory]:
    made = DeviceMemory(Cuda(runtime), BLOCKS, SIZE, buffer_bytes=3 * SIZE + 1)
    yield made
    made.close()


def data(block: int) -> bytes:
    return bytes([block + 1]) * SIZE


def put(memory: DeviceMemory, blocks: list[int]) -> None:
    expected = b"".join(data(block) for block in blocks)
    for place in memory.incoming(blocks):
        place[:], expected = expected[: len(place)], expected[len(place) :]
    assert not expected


def got(memory: DeviceMemory, blocks: list[int]) -> bytes:
    return b"".join(bytes(piece) for piece in memory.outgoing(blocks))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, BLOCKS])
def test_blocks_in_any_order_come_back_as_they_went_in(memory: DeviceMemory, count: int) -> None:
    order = list(range(BLOCKS))
    random.Random(count).shuffle(order)
    put(memory, order[:count])
    assert got(memory, order[:count]) == b"".join(data(block) for block in order[:count])
    assert got(memory, order[count:]) == bytes(SIZE * (BLOCKS - count))


async def test_the_next_piece_is_copied_while_one_is_sent(memory: DeviceMemory, runtime: FakeRuntime) -> None:
    with closing(memory.outgoing(list(range(9)))) as pieces:
        next(pieces)
        await until(lambda: runtime.copies == 2, "the second piece is copied though nobody asked for it")


async def test_the_next_piece_is_received_while_one_is_copied(memory: DeviceMemory, runtime: FakeRuntime) -> None:
    with closing(memory.incoming(list(range(9)))) as places:
        next(places)[:] = b"a" * 3 * SIZE
        next(places)
        assert runtime.copies == 0  # it was handed out before the first had arrived
        await until(lambda: runtime.copies == 1, "the first piece is copied")


def test_an_abandoned_transfer_writes_nothing_afterwards(memory: DeviceMemory, runtime: FakeRuntime) -> None:
    with closing(memory.incoming(list(range(9)))) as places:
        next(places)[:] = b"a" * 3 * SIZE
        next(places)[:SIZE] = b"b" * SIZE
    copies = runtime.copies
    assert copies == 1
    assert got(memory, list(range(3))) == b"a" * 3 * SIZE
    assert got(memory, list(range(3, 9))) == bytes(6 * SIZE)


def test_buffers_are_used_again_and_only_as_many_are_made_as_transfers_are_under_way(
    memory: DeviceMemory, runtime: FakeRuntime
) -> None:
    for _ in range(3):
        put(memory, [1, 2])
    assert runtime.left[1] == 2
    with closing(memory.outgoing([1])) as first, closing(memory.outgoing([2])) as second:
        assert bytes(next(first)) + bytes(next(second)) == data(1) + data(2)
        assert runtime.left[1] == 4


def test_a_block_larger_than_a_buffer_goes_alone(runtime: FakeRuntime) -> None:
    memory = DeviceMemory(Cuda(runtime), BLOCKS, SIZE, buffer_bytes=1)
    put(memory, [4, 5])
    assert got(memory, [5, 4]) == data(5) + data(4)
    memory.close()


def test_private_blocks_lie_behind_those_of_the_pool(runtime: FakeRuntime) -> None:
    memory = DeviceMemory(Cuda(runtime), BLOCKS, SIZE, private=2)
    assert memory.size == (BLOCKS + 2) * SIZE
    put(memory, [BLOCKS + 1])
    assert got(memory, list(range(BLOCKS + 1))) == bytes((BLOCKS + 1) * SIZE)
    memory.close()


def test_what_the_device_refuses_is_an_error_in_its_own_words(memory: DeviceMemory) -> None:
    with pytest.raises(EngineFailed, match="cudaMemcpyAsync failed: cudaErrorInvalidValue"):
        got(memory, [BLOCKS])


def test_a_pool_larger_than_the_device_is_refused_with_its_size() -> None:
    with pytest.raises(NotEnoughMemory, match="needs 6400 bytes of the GPU"):
        DeviceMemory(Cuda(FakeRuntime(memory=6000)), 100, 64)


def test_without_the_bindings_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(cuda_module.importlib, "import_module", missing)
    with pytest.raises(DependencyMissing, match=r"pip install 'splitserve\[cuda\]'"):
        cuda_module.load_cuda()
