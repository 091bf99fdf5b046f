# SPDX-License-Identifier: MIT OR Apache-2.0
"""The disks whose data is compared with a model, each with what is special about it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from .command import run
from .face import NATIVE, device_id
from .server import Server

SIZE = 8 << 20


@dataclass
class Served:
    """A disk that runs."""

    path: str
    # Smallest unit of direct I/O, and the longest request that is not split.
    unit: int
    longest: int
    # The file or device behind it, if there is one.
    backing: Path | None = None
    # The Python process behind it, if there is one.
    server: Server | None = None


@dataclass(frozen=True)
class Backend:
    """A way to get a disk of `SIZE` bytes full of zeros."""

    name: str
    open: Callable[..., Iterator[Served]]

    def serve(self, scratch: Path, *, queues: int = 1, depth: int = 128):
        return contextmanager(self.open)(scratch, queues, depth)

    def __repr__(self) -> str:
        return self.name


@contextmanager
def added(*words: str) -> Iterator[str]:
    """A device of the Rust program."""
    path = NATIVE.add(*words)
    try:
        yield path
    finally:
        NATIVE.run("del", "-n", str(device_id(path)))


@contextmanager
def loop_device(file: Path, block_size: int = 512) -> Iterator[str]:
    """A kernel loop device on a file."""
    path = run(["losetup", "--find", "--show", f"--sector-size={block_size}", file]).out.strip()
    try:
        yield path
    finally:
        run(["losetup", "--detach", path])


def image(scratch: Path, size: int = SIZE, name: str = "disk.img") -> Path:
    """A sparse file."""
    file = scratch / name
    with file.open("wb") as opened:
        opened.truncate(size)
    return file


def _mem(scratch: Path, queues: int, depth: int) -> Iterator[Served]:
    with added("-t", "mem", "--size", str(SIZE), "-q", str(queues), "-d", str(depth)) as path:
        yield Served(path, 512, 512 << 10)


def _file(io: str, *more: str, unit: int = 512) -> Callable[..., Iterator[Served]]:
    def serve(scratch: Path, queues: int, depth: int) -> Iterator[Served]:
        file = image(scratch)
        words = ("-t", "file", "-f", str(file), "--io", io, "-q", str(queues), "-d", str(depth), *more)
        with added(*words) as path:
            yield Served(path, unit, 512 << 10, backing=file)

    return serve


def _on_loop(scratch: Path, queues: int, depth: int) -> Iterator[Served]:
    with ExitStack() as stack:
        below = stack.enter_context(loop_device(image(scratch)))
        words = ("-t", "loop", "-f", below, "-q", str(queues), "-d", str(depth))
        path = stack.enter_context(added(*words))
        yield Served(path, 512, 512 << 10, backing=Path(below))


def _on_ublk(scratch: Path, queues: int, depth: int) -> Iterator[Served]:
    with ExitStack() as stack:
        below = stack.enter_context(added("-t", "mem", "--size", str(SIZE)))
        path = stack.enter_context(added("-t", "file", "-f", below, "-q", str(queues), "-d", str(depth)))
        yield Served(path, 512, 512 << 10, backing=Path(below))


def _python(disk: str, unit: int = 512) -> Callable[..., Iterator[Served]]:
    def serve(scratch: Path, queues: int, depth: int) -> Iterator[Served]:
        with Server(disk, size=SIZE, block_size=unit, queues=queues, depth=depth) as server:
            yield Served(server.path, unit, 512 << 10, server=server)

    return serve


MEM = Backend("mem", _mem)
FILE_DIRECT = Backend("file-direct", _file("direct"))
FILE_BUFFERED = Backend("file-buffered", _file("buffered"))
FILE_4K = Backend("file-4k", _file("auto", "--block-size", "4096", unit=4096))
FILE_ON_LOOP = Backend("file-on-loop", _on_loop)
FILE_ON_UBLK = Backend("file-on-ublk", _on_ublk)
PYTHON_RAM = Backend("python-ram", _python("Ram"))
PYTHON_RAM_4K = Backend("python-ram-4k", _python("Ram", unit=4096))

ALL = [MEM, FILE_DIRECT, FILE_BUFFERED, FILE_4K, FILE_ON_LOOP, FILE_ON_UBLK, PYTHON_RAM, PYTHON_RAM_4K]
