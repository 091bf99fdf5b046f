# SPDX-License-Identifier: MIT OR Apache-2.0

"""Disk in a file, whose data passes through Python (unlike with `ublk.File`).

Run it with ``ublk run file.py:FileDisk -a path=disk.img``.
"""

import os

import ublk


class FileDisk(ublk.BlockDevice):
    """Disk with the content of a file."""

    def __init__(self, path):
        self.file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        # The kernel reports a failed sync to one of several callers only; `FileSync` remembers it for all.
        self.file_sync = ublk.FileSync(self.file)
        super().__init__(size=os.fstat(self.file).st_size)

    def read(self, offset, buf):
        # Return the number of bytes: if the file has been truncated, the request fails.
        return os.preadv(self.file, [buf], offset)

    def write(self, offset, buf):
        return os.pwritev(self.file, [buf], offset)

    def flush(self):
        self.file_sync.sync()
