# SPDX-License-Identifier: MIT OR Apache-2.0

"""Try block devices in this process: on any machine, without a kernel, without privileges.

`open` serves a `BlockDevice` on a stand-in for the driver, by the same engine, with the same buffers, checks and errors
as in earnest, and gives a file on it::

    with ublk.testing.open(MyDisk(1 << 20)) as file:
        file.pwrite(4096, b"x" * 4096)
        assert file.pread(4096, 4096) == b"x" * 4096

What it does not have is the block layer's: no page cache, no reordering, no partitions.
"""

from __future__ import annotations

import errno
import io
import os
from typing import TYPE_CHECKING, Any, Self

from ublk import _ublk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

    from ublk._block_device import BlockDevice
    from ublk._device import Device
    from ublk._native import NativeDisk

__all__ = ["File", "open"]


class File(io.RawIOBase):
    """A disk as an unbuffered file; made by `open`.

    Offsets and lengths are bytes. What is longer than a request can be becomes several. What does not begin and end
    with a block is read, changed and written back, as the page cache does. A request that fails raises `OSError`
    with its errno. Threads may use `pread` and `pwrite` at the same time.
    """

    def __init__(self, disk: BlockDevice | NativeDisk, **options: Any) -> None:
        super().__init__()
        if options.get("isolated"):
            raise ValueError("a disk without a kernel is served in this process: it cannot be isolated")
        self._driver = _ublk.FakeDriver()
        self._position = 0
        self.device: Device = disk.start(**options, _driver=self._driver)
        """The running device."""
        self.device.wait_ready()

    def __enter__(self) -> Self:
        return self

    @property
    def size(self) -> int:
        """Capacity in bytes."""
        return self.device.size

    def readable(self) -> bool:
        """Every disk is."""
        return True

    def seekable(self) -> bool:
        """Every disk is."""
        return True

    def writable(self) -> bool:
        """Whether the disk has a way to write."""
        return not self.device.read_only

    def tell(self) -> int:
        """Tell where the next `read` or `write` begins."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move there."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Buffer, /) -> int:
        """Read from the present position on; less at the disk's end."""
        view = memoryview(buffer).cast("B")
        data = self.pread(self._position, min(len(view), max(self.size - self._position, 0)))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def write(self, data: Buffer, /) -> int:
        """Write at the present position; ``ENOSPC`` beyond the disk's end."""
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
        """Write a range, and tell its length."""
        if not self.writable():
            raise io.UnsupportedOperation("the disk is read-only")
        content = memoryview(data).cast("B").tobytes()
        self._check(offset, len(content), errno.ENOSPC)
        first, last = self._blocks(offset, len(content))
        if offset > first:
            content = self.pread(first, offset - first) + content
        if first + len(content) < last:
            content += self.pread(first + len(content), last - first - len(content))
        for at, size in self._requests(first, last):
            self._driver.write(self.device.id, at, content[at - first :][:size])
        return len(memoryview(data).cast("B"))

    def flush(self) -> None:
        """Make what was written durable; nothing, for disks without a cache."""
        # Closing flushes, also a file whose device could not be started.
        if not self.closed and hasattr(self, "device") and "flush" in self.device.operations:
            self._driver.flush(self.device.id)

    def discard(self, offset: int, length: int) -> None:
        """Forget whole blocks; ``EOPNOTSUPP`` if the disk cannot."""
        if "discard" not in self.device.operations:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        self._check_aligned(offset, length)
        self._driver.discard(self.device.id, offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Zero whole blocks; by writing them, if the disk has no better way."""
        self._check_aligned(offset, length)
        if "write_zeroes" in self.device.operations:
            self._driver.write_zeroes(self.device.id, offset, length)
        else:
            self.pwrite(offset, bytes(length))

    def close(self) -> None:
        """Stop the device. Raises `AssertionError` if the library has broken a rule of the driver."""
        if self.closed:
            return
        try:
            super().close()
        finally:
            if hasattr(self, "device"):
                self.device.stop()
        # Collecting one that could not be made closes it too.
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

    def _check(self, offset: int, length: int, code: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OSError(code, f"{offset}+{length} is not on a disk of {self.size} bytes")

    def _check_aligned(self, offset: int, length: int) -> None:
        if not self.writable():
            raise io.UnsupportedOperation("the disk is read-only")
        self._check(offset, length, errno.EINVAL)
        if offset % self.device.block_size or length % self.device.block_size:
            raise OSError(errno.EINVAL, f"{offset}+{length} is not whole blocks of {self.device.block_size} bytes")


def open(disk: BlockDevice | NativeDisk, **options: Any) -> File:
    """Serve a block device and give a file on its disk. The options are those of `BlockDevice.start`."""
    return File(disk, **options)
