# SPDX-License-Identifier: MIT OR Apache-2.0

"""A writable snapshot of a disk image, thin: what was written is in a file of its own, the rest in the image.

Python decides where each block is stored, once. The kernel reads and writes it there, without a copy where it can. An
index, a file with a byte for each block, says which blocks were written: after a crash as well, because a block is
durable before the index names it.

Run it with ``ublk run snapshot.py:Snapshot -a image=disk.img -a changes=changes``.
"""

import os
import threading

import ublk

BLOCK = 65536


def write_all(file, data, offset):
    """Write everything, or raise: a full disk may take a part."""
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count


class Snapshot(ublk.BlockDevice):
    """A disk that begins as the image, and leaves it as it is."""

    def __init__(self, image, changes):
        self.image = os.open(image, os.O_RDONLY)
        size = os.fstat(self.image).st_size // 4096 * 4096
        super().__init__(size=size)
        # Block N of the disk, once written, is block N of this file, which has holes elsewhere.
        self.changes = os.open(changes, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self.changes, size)
        self.index = os.open(f"{changes}.index", os.O_RDWR | os.O_CREAT, 0o600)
        # A failure of the sync in `write` concerns every flush.
        self.changes_sync, self.index_sync = ublk.FileSync(self.changes), ublk.FileSync(self.index)
        blocks = -(-size // BLOCK)
        self.changed = bytearray(os.pread(self.index, blocks, 0).ljust(blocks, b"\0"))
        self.lock = threading.Lock()

    def map(self, op, offset, length):
        """Give the whole block, for good: it moves once only, and `write` says so."""
        number = offset // BLOCK
        start = number * BLOCK
        size = min(BLOCK, self.size - start)
        if self.changed[number]:
            return ublk.Extent(self.changes, start, size, start=start, stable=True)
        if op == "read":
            return ublk.Extent(self.image, start, size, start=start, stable=True)
        return None  # the first write to a block

    def write(self, offset, buf):
        """Copy the blocks that are written to for the first time, and write."""
        with self.lock:
            for number in range(offset // BLOCK, (offset + len(buf) - 1) // BLOCK + 1):
                if not self.changed[number]:
                    block = os.pread(self.image, min(BLOCK, self.size - number * BLOCK), number * BLOCK)
                    write_all(self.changes, block, number * BLOCK)
                    # The next server, after a kill, knows the block by the index; and if the machine fails, the
                    # index may be on the disk without the block, unless that is durable first.
                    self.changes_sync.sync()
                    write_all(self.index, b"\1", number)
                    self.changed[number] = 1
                    # Reads from now on find the copy.
                    self.invalidate(number * BLOCK, BLOCK)
            write_all(self.changes, buf, offset)

    def flush(self):
        """Make the blocks and the index durable, including what the last server wrote."""
        self.changes_sync.sync()
        self.index_sync.sync()
