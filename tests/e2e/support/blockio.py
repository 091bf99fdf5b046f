# SPDX-License-Identifier: MIT OR Apache-2.0
"""Reading and writing a disk, with and without the page cache."""

import ctypes
import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

from .pace import patience

SECTOR = 512
PAGE = mmap.PAGESIZE

FALLOC_KEEP_SIZE = 0x01
FALLOC_PUNCH_HOLE = 0x02
FALLOC_ZERO_RANGE = 0x10
BLKDISCARD = 0x1277

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Disk:
    """An open disk (or file). Offsets and lengths are bytes."""

    def __init__(self, path: str, *, direct: bool, read_only: bool = False) -> None:
        self.path = path
        self.direct = direct
        flags = os.O_RDONLY if read_only else os.O_RDWR
        self.fd = os.open(path, flags | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))

    def __enter__(self) -> "Disk":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self.fd)

    @property
    def size(self) -> int:
        return os.lseek(self.fd, 0, os.SEEK_END)

    def read(self, offset: int, length: int, *, skew: int = 0) -> bytes:
        """Reads; `skew` moves the memory off the start of a page. May be short at the disk's end."""
        with _memory(length, skew) as view:
            done = 0
            while done < length:
                count = os.preadv(self.fd, [view[done:]], offset + done)
                if count == 0:
                    break
                done += count
            return bytes(view[:done])

    def write(self, offset: int, data: bytes, *, skew: int = 0, flags: int = 0) -> None:
        """Writes all of it, or raises."""
        with _memory(len(data), skew) as view:
            view[:] = data
            done = 0
            while done < len(data):
                done += os.pwritev(self.fd, [view[done:]], offset + done, flags)

    def write_durably(self, offset: int, data: bytes) -> None:
        """Writes so that the data is on stable storage when this returns."""
        self.write(offset, data, flags=os.RWF_DSYNC)

    def sync(self) -> None:
        os.fsync(self.fd)

    def drop_cache(self) -> None:
        """Forgets clean cached pages, so that the next buffered read comes from the disk."""
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def punch(self, offset: int, length: int) -> None:
        self._fallocate(FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, offset, length)

    def zero_range(self, offset: int, length: int) -> None:
        self._fallocate(FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE, offset, length)

    def discard(self, offset: int, length: int) -> None:
        fcntl.ioctl(self.fd, BLKDISCARD, struct.pack("QQ", offset, length))

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        if _libc.fallocate(self.fd, mode, offset, length) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), self.path)


@contextmanager
def _memory(length: int, skew: int):
    """Memory that starts `skew` bytes behind the start of a page."""
    memory = mmap.mmap(-1, max(length + skew, 1))
    whole = memoryview(memory)
    view = whole[skew : skew + length]
    try:
        yield view
    finally:
        view.release()
        whole.release()
        memory.close()


def cached_bytes(path: os.PathLike) -> int:
    """How much of a file is in the page cache."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        pages = (ctypes.c_ubyte * ((len(mapping) + PAGE - 1) // PAGE))()
        first = ctypes.c_char.from_buffer(mapping)
        failed = _libc.mincore(ctypes.byref(first), ctypes.c_size_t(len(mapping)), pages)
        number = ctypes.get_errno()
        # The mapping cannot be closed while this refers to it.
        del first
        if failed:
            raise OSError(number, os.strerror(number), path)
        return sum(page & 1 for page in pages) * PAGE


def error_of(action: Callable[[], Any]) -> int:
    """The errno that an action fails with, 0 if it does not."""
    try:
        action()
    except OSError as error:
        return error.errno
    return 0


class Tasks:
    """Actions in threads of their own. Their errors come back from `join`."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def start(self, action: Callable[..., Any], *args: Any, cpu: int | None = None) -> threading.Thread:
        def body() -> None:
            try:
                if cpu is not None:
                    os.sched_setaffinity(threading.get_native_id(), {cpu})
                action(*args)
            except BaseException as error:
                self._errors.append(error)

        thread = threading.Thread(target=body, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def join(self, seconds: float = 30.0) -> None:
        seconds = patience(seconds)
        for thread in self._threads:
            thread.join(seconds)
            assert not thread.is_alive(), f"a task still runs after {seconds:g} s"
        if self._errors:
            raise self._errors[0]


def together(actions: Sequence[Callable[[], Any]], *, cpus: Sequence[int] | None = None, seconds: float = 30.0) -> None:
    """Runs actions at the same time, each on its CPU if `cpus` are given."""
    tasks = Tasks()
    for index, action in enumerate(actions):
        tasks.start(action, cpu=cpus[index] if cpus else None)
    tasks.join(seconds)
