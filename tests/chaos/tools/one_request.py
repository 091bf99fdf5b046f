# SPDX-License-Identifier: MIT OR Apache-2.0
"""A direct read or write of a disk by a process of its own, which may never end."""

import errno
import mmap
import os
import select

from support.pace import patience

from . import content


class OneRequest:
    """A request that is under way. Made by a fork: the caller must not have other threads."""

    def __init__(self, operation: str, path: str, offset: int, length: int) -> None:
        self._length = length
        self._pipe, write = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(self._pipe)
                os.setsid()
                os.write(write, _answer(operation, path, offset, length))
            finally:
                os._exit(0)
        os.close(write)

    def answer(self, seconds: float) -> tuple[int, bytes] | None:
        """The errno, 0 for success, and what was read; None if there is no answer in time."""
        data = b""
        while len(data) < 4 + self._length:
            if not select.select([self._pipe], [], [], patience(seconds))[0]:
                return None
            chunk = os.read(self._pipe, 1 << 16)
            if not chunk:
                break
            data += chunk
        os.close(self._pipe)
        os.waitpid(self._pid, 0)
        assert len(data) >= 4, "the client has died"
        return int.from_bytes(data[:4], "little"), data[4:]


def _answer(operation: str, path: str, offset: int, length: int) -> bytes:
    memory = mmap.mmap(-1, length)
    try:
        file = os.open(path, os.O_RDWR | os.O_DIRECT)
        if operation == "read":
            done = os.preadv(file, [memory], offset)
        else:
            memory[:] = content.sectors(1, offset // content.SECTOR, length // content.SECTOR, 1)
            done = os.pwritev(file, [memory], offset)
        number = 0 if done == length else errno.EIO
    except OSError as error:
        number = error.errno or errno.EIO
    return number.to_bytes(4, "little") + memory[:]
