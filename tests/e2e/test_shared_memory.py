# SPDX-License-Identifier: MIT OR Apache-2.0
"""Clients share memory with a server: their direct I/O needs no copy."""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import sysfs
from support.backends import image
from support.blockio import Tasks
from support.face import Face, device_id
from support.features import has
from support.server import Server, ServerFailed
from support.waiting import until

pytestmark = pytest.mark.long

SIZE = 8 << 20
SHARED = 1 << 20


@pytest.fixture
def memory() -> Iterator[Path]:
    path = Path("/dev/shm/ublk-test")
    with path.open("wb") as file:
        file.truncate(SHARED)
    yield path
    path.unlink()


@pytest.mark.parametrize("kind", ["mem", "file"])
@pytest.mark.parametrize("batch", ["on", "off"])
def test_data_goes_from_and_to_shared_memory(kind: str, batch: str, native: Face, scratch: Path, memory: Path) -> None:
    words = ["-t", kind, "--shared-memory", memory, "--batch", batch]
    words += ["-f", image(scratch, SIZE)] if kind == "file" else ["--size", str(SIZE)]
    if not has("SHMEM_ZC") or (batch == "on" and not has("BATCH_IO")):
        refused = native.run("add", *words, check=False)
        assert refused.status == 1, str(refused)
        assert "7." in refused.err, str(refused)
        return
    path = native.add(*words)
    assert "SHMEM_ZC" in native.info(path)["features"]
    exchange(path, memory)
    native.run("del", "-n", str(device_id(path)))


def exchange(path: str, memory: Path) -> None:
    """Writes and reads, from and to shared memory and other memory."""
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        with memory.open("r+b") as file, mmap.mmap(file.fileno(), SHARED) as mapped:
            whole = memoryview(mapped)
            for n in range(16):
                part = whole[n * 4096 : n * 4096 + 8192]
                part[:] = bytes([n + 1]) * 8192
                assert os.pwritev(fd, [part], n * 8192) == 8192
                part.release()
            for n in range(16):
                part = whole[(40 + n) * 4096 : (40 + n) * 4096 + 8192]
                assert os.preadv(fd, [part], n * 8192) == 8192
                assert bytes(part) == bytes([n + 1]) * 8192
                part.release()
            whole.release()
        # Other memory works as ever.
        with mmap.mmap(-1, 8192) as private:
            assert os.preadv(fd, [private], 8192) == 8192
            assert private[:] == b"\x02" * 8192
            private[:] = b"\x77" * 8192
            assert os.pwritev(fd, [private], 0) == 8192
            assert os.preadv(fd, [private], 0) == 8192
            assert private[:] == b"\x77" * 8192
    finally:
        os.close(fd)
    # A reader may go on before the kernel has put its request away.
    until(lambda: sysfs.in_flight(path) == 0, "no request in flight")


@pytest.mark.skipif(not has("SHMEM_ZC"), reason="SHMEM_ZC came with Linux 7.1")
@pytest.mark.parametrize(
    ("kind", "workers"), [("Ram", None), ("Ram", 2), ("TaskRam", None), ("BatchRam", None), ("Halves", None)]
)
def test_handlers_in_python_work_on_shared_memory(kind: str, workers: int | None, memory: Path, scratch: Path) -> None:
    args = {"path": str(image(scratch, SIZE))} if kind == "Halves" else {}
    with Server(kind, shared_memory=True, workers=workers, **args) as server:
        number = server.ask(f"dev.share_memory(open('{memory}', 'r+b'))")
        exchange(server.path, memory)
        server.ask(f"dev.unshare_memory({number})")
        assert server.ask(f"caught(lambda: dev.unshare_memory({number}))") == "UblkError"
        exchange(server.path, memory)


@pytest.mark.skipif(not has("SHMEM_ZC"), reason="SHMEM_ZC came with Linux 7.1")
def test_a_client_sees_a_reads_data_when_it_has_ended(memory: Path) -> None:
    with Server("Gated", shared_memory=True) as server:
        server.ask(f"dev.share_memory(open('{memory}', 'r+b'))")
        server.ask("setattr(disk, 'armed', True)")
        fd = os.open(server.path, os.O_RDWR | os.O_DIRECT)
        try:
            with memory.open("r+b") as file, mmap.mmap(file.fileno(), SHARED) as mapped:
                tasks = Tasks()
                with memoryview(mapped)[8192:12288] as part:
                    tasks.start(lambda: os.preadv(fd, [part], 0))
                    # The handler has written to a copy, and not returned.
                    assert server.ask("disk.filled.wait(10)") is True
                    assert mapped[8192:12288] == bytes(4096)
                    server.ask("disk.gate.set()")
                    tasks.join()
                assert mapped[8192:12288] == b"\x5a" * 4096
        finally:
            os.close(fd)


@pytest.mark.skipif(has("SHMEM_ZC"), reason="this driver has it")
def test_an_older_driver_is_named_as_the_reason() -> None:
    with pytest.raises(ServerFailed, match=r"7\.1"):
        Server("Ram", shared_memory=True)


def test_memory_that_cannot_be_shared_is_named(native: Face, scratch: Path) -> None:
    for words, message in (
        (["--shared-memory", "/nonexistent"], "/nonexistent"),
        (["--shared-memory", "/dev/null", "--recovery"], "--recovery"),
    ):
        refused = native.run("add", "-t", "null", *words, check=False)
        assert refused.status == 1, str(refused)
        assert message in refused.err or not has("SHMEM_ZC"), str(refused)
    assert native.list() == []
