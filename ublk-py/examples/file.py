# SPDX-License-Identifier: MIT OR Apache-2.0

"""A disk in a file, byte by byte through Python. (`ublk.File` is the same without Python.)

Run it with ``ublk run file.py:FileDisk -a path=disk.img``.
"""

import os

import ublk


class FileDisk(ublk.BlockDevice):
    """The file's content."""

    def __init__(self, path):
        self.file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        # Of flushes on several queues the kernel reports a failure to one: this remembers it for all.
        self.file_sync = ublk.FileSync(self.file)
        super().__init__(size=os.fstat(self.file).st_size)

    def read(self, offset, buf):
        # The number of bytes: a file that has become too short is an error of the request.
        return os.preadv(self.file, [buf], offset)

    def write(self, offset, buf):
        return os.pwritev(self.file, [buf], offset)

    def flush(self):
        self.file_sync.sync()
