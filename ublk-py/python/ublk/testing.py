# SPDX-License-Identifier: MIT OR Apache-2.0

"""Tests of block devices in one process, without the kernel's driver and without privileges.

`ublk.testing.open` serves a `ublk.BlockDevice` on a stand-in for the driver, with the real engine, buffers, checks and
errors, and returns a binary file::

    with ublk.testing.open(MyDisk(1 << 20)) as file:
        file.pwrite(4096, b"x" * 4096)
        assert file.pread(4096, 4096) == b"x" * 4096

The memory of a read is filled with `ublk.testing.POISON` before its handler runs, so that bytes that the handler leaves
unwritten are visible. The block layer is not simulated: there is no page cache, no reordering and no partitions.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import threading
from typing import TYPE_CHECKING, Any, Self, Unpack

from ublk import _driver, _ublk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from typing_extensions import Buffer

    from ublk._block_device import BlockDevice
    from ublk._device import Device
    from ublk._native import NativeDisk
    from ublk._options import StartOptions

__all__ = ["POISON", "File", "open"]

POISON = 0xA5
"""Value of each byte of a read that its handler has not written."""

# The block layer counts the sectors of a request in 32 bits.
_MAX_SECTORS = (1 << 32) - 1


class _Ranges:
    """Locked ranges of writes in progress. Writes of whole blocks may overlap, but not with writes of parts of blocks.

    A part of a block is written by reading, changing and writing the block, which would undo concurrent writes to it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy: list[tuple[int, int, bool]] = []

    @contextlib.contextmanager
    def locked(self, first: int, last: int, *, alone: bool) -> Iterator[None]:
        mine = (first, last, alone)
        with self._changed:
            self._changed.wait_for(lambda: not any(self._conflict(mine, other) for other in self._busy))
            self._busy.append(mine)
        try:
            yield
        finally:
            with self._changed:
                self._busy.remove(mine)
                self._changed.notify_all()

    @staticmethod
    def _conflict(one: tuple[int, int, bool], other: tuple[int, int, bool]) -> bool:
        return (one[2] or other[2]) and one[0] < other[1] and other[0] < one[1]


class File(io.RawIOBase):
    """Unbuffered binary file on a disk; returned by `ublk.testing.open`.

    Offsets and lengths are in bytes. Long transfers become several requests; transfers that are not whole blocks are
    read, modified and written back, as the page cache does. A failed request raises `OSError` with its errno. The
    methods that take an offset may be called from several threads concurrently.

    Closing flushes and stops the device. So does leaving the ``with`` block, except by an exception, which acts like
    `abort`. If stopping fails, the file stays open, and closing it again retries.
    """

    # Whether the device was stopped.
    _stopped = False

    def __init__(self, disk: BlockDevice | NativeDisk, **options: Unpack[StartOptions]) -> None:
        super().__init__()
        if options.get("isolated"):
            raise ValueError("isolated=True is not supported without a kernel")
        self._driver = _ublk.FakeDriver()
        self._position = 0
        self._ranges = _Ranges()
        # Native disks take some of the options only.
        start: Callable[..., Device] = disk.start
        with _driver.using(self._driver):
            self.device: Device = start(**options)
        """The running device."""
        self.device.wait_ready()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        """Close the file; after an exception as `abort`."""
        if kind is None:
            self.close()
        else:
            self.abort()

    @property
    def size(self) -> int:
        """Capacity in bytes."""
        return self.device.size

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def writable(self) -> bool:
        """Return whether the disk can be written."""
        return not self.device.read_only

    def tell(self) -> int:
        """Return the current position."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Set the current position, and return it."""
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}
        if whence not in bases:
            raise ValueError(f"invalid whence ({whence}, should be {', '.join(map(str, bases))})")
        base = bases[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Buffer, /) -> int:
        """Read from the current position; fewer bytes at the end of the disk."""
        view = memoryview(buffer).cast("B")
        length = min(len(view), max(self.size - self._position, 0))
        data = self.pread(self._position, length) if length else b""
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def write(self, data: Buffer, /) -> int:
        """Write at the current position. Raises `OSError` (``ENOSPC``) beyond the end of the disk."""
        count = self.pwrite(self._position, data)
        self._position += count
        return count

    def pread(self, offset: int, length: int) -> bytes:
        """Read a range."""
        self._check(offset, length, errno.EINVAL)
        first, last = self._blocks(offset, length)
        parts = [self._driver.read(self.device.id, at, size) for at, size in self._requests(first, last)]
        return b"".join(parts)[offset - first :][:length]

    def pwrite(self, offset: int, data: Buffer) -> int:
        """Write a range, and return its length."""
        if not self.writable():
            raise io.UnsupportedOperation("the disk is read-only")
        content = memoryview(data).cast("B").tobytes()
        length, end = len(content), offset + len(content)
        self._check(offset, length, errno.ENOSPC)
        first, last = self._blocks(offset, length)
        with self._ranges.locked(first, last, alone=offset > first or end < last):
            block = self.device.block_size
            head = tail = b""
            if offset > first:
                head = self.pread(first, block)
            if end < last:
                # The last block may be the first one.
                tail = head if head and last - first == block else self.pread(last - block, block)
            content = head[: offset - first] + content + tail[block - (last - end) :]
            for at, size in self._requests(first, last):
                self._driver.write(self.device.id, at, content[at - first :][:size])
        return length

    def flush(self) -> None:
        """Flush the disk's write cache, if it has one. Raises `OSError` (``ENODEV``) if the device has ended."""
        # The base class's `close` calls this too; when a file is collected, also without a device.
        if not self.closed and not self._stopped and hasattr(self, "device") and "flush" in self.device.operations:
            self._driver.flush(self.device.id)

    def discard(self, offset: int, length: int) -> None:
        """Discard whole blocks. Raises `OSError` (``EOPNOTSUPP``) if the disk does not support it."""
        if "discard" not in self.device.operations:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        self._check_aligned(offset, length)
        with self._ranges.locked(offset, offset + length, alone=False):
            for at, size in self._long_requests(offset, offset + length):
                self._driver.discard(self.device.id, at, size)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Zero whole blocks, by writing zeros if the disk has no ``write_zeroes``."""
        self._check_aligned(offset, length)
        if "write_zeroes" in self.device.operations:
            with self._ranges.locked(offset, offset + length, alone=False):
                for at, size in self._long_requests(offset, offset + length):
                    self._driver.write_zeroes(self.device.id, at, size)
        else:
            for at, size in self._requests(offset, offset + length):
                self.pwrite(at, bytes(size))

    def close(self) -> None:
        """Flush and stop the device. Raises `AssertionError` if the library has violated the driver's protocol."""
        if self.closed:
            return
        if hasattr(self, "device"):
            # A handler would wait for itself, and so would the flush.
            self.device._check_end()
        try:
            # A device that has ended cannot be flushed.
            if hasattr(self, "device") and self.device.running:
                self.flush()
        finally:
            self._stop()

    def abort(self) -> None:
        """Stop the device as a power cut would.

        Nothing is flushed, requests in flight fail, and their tasks are cancelled. Raises like `close`.
        """
        if not self.closed:
            self._stop(timeout=0, cancel=True)

    def _stop(self, **how: Any) -> None:
        if hasattr(self, "device"):
            self.device.stop(**how)
        self._stopped = True
        super().close()
        # A file that was not constructed completely is closed, too, when it is collected.
        if hasattr(self, "_driver"):
            broken = self._driver.violations()
            assert not broken, broken

    def _blocks(self, offset: int, length: int) -> tuple[int, int]:
        """Widen a range to whole blocks."""
        block = self.device.block_size
        return offset // block * block, (offset + length + block - 1) // block * block

    def _requests(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Divide a range into requests."""
        step = self.device.max_io_bytes
        return ((at, min(step, last - at)) for at in range(first, last, step))

    def _long_requests(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Divide a range into requests without data."""
        step = _MAX_SECTORS * 512 // self.device.block_size * self.device.block_size
        return ((at, min(step, last - at)) for at in range(first, last, step))

    def _check(self, offset: int, length: int, code: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OSError(code, f"{offset}+{length} exceeds the disk of {self.size} bytes")

    def _check_aligned(self, offset: int, length: int) -> None:
        if not self.writable():
            raise io.UnsupportedOperation("the disk is read-only")
        self._check(offset, length, errno.EINVAL)
        if offset % self.device.block_size or length % self.device.block_size:
            block = self.device.block_size
            raise OSError(errno.EINVAL, f"{offset}+{length} is not a multiple of the block size ({block})")


def open(disk: BlockDevice | NativeDisk, **options: Unpack[StartOptions]) -> File:
    """Serve a block device and return a file on it. The options are those of `ublk.BlockDevice.start`."""
    return File(disk, **options)
