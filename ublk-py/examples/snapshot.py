# SPDX-License-Identifier: MIT OR Apache-2.0

"""Thin writable snapshot of a disk image: written blocks are stored in a separate file, the others in the image.

Python decides once where each block is stored. The kernel reads and writes it there, without a copy if possible. An
index, a file with a byte for each block, shows which blocks were written. That is also true after a crash, because a
block is durable before the index contains it.

Run it with ``ublk run snapshot.py:Snapshot -a image=disk.img -a changes=changes``.
"""

import os
import threading

import ublk

BLOCK = 65536


def write_all(file, data, offset):
    """Write all of the data, or raise: a write to a full disk may be short."""
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count


class Snapshot(ublk.BlockDevice):
    """Disk that starts with the content of the image and does not change the image."""

    def __init__(self, image, changes):
        self.image = os.open(image, os.O_RDONLY)
        size = os.fstat(self.image).st_size // 4096 * 4096
        super().__init__(size=size)
        # Block N of the disk, once written, is block N of this sparse file.
        self.changes = os.open(changes, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self.changes, size)
        self.index = os.open(f"{changes}.index", os.O_RDWR | os.O_CREAT, 0o600)
        # A failed sync in `write` must also fail later flushes.
        self.changes_sync, self.index_sync = ublk.FileSync(self.changes), ublk.FileSync(self.index)
        blocks = -(-size // BLOCK)
        self.changed = bytearray(os.pread(self.index, blocks, 0).ljust(blocks, b"\0"))
        self.lock = threading.Lock()

    def map(self, op, offset, length):
        """Return a stable extent with the whole block, which `write` invalidates when it copies the block."""
        number = offset // BLOCK
        start = number * BLOCK
        size = min(BLOCK, self.size - start)
        if self.changed[number]:
            return ublk.Extent(self.changes, start, size, start=start, stable=True)
        if op == "read":
            return ublk.Extent(self.image, start, size, start=start, stable=True)
        return None  # The first write to a block.

    def write(self, offset, buf):
        """Copy each block before its first write, and write."""
        with self.lock:
            for number in range(offset // BLOCK, (offset + len(buf) - 1) // BLOCK + 1):
                if not self.changed[number]:
                    block = os.pread(self.image, min(BLOCK, self.size - number * BLOCK), number * BLOCK)
                    write_all(self.changes, block, number * BLOCK)
                    # The next server finds the block in the index. The block must be durable first: after a power
                    # failure the index might be stored without it.
                    self.changes_sync.sync()
                    write_all(self.index, b"\1", number)
                    self.changed[number] = 1
                    # Later reads use the copy.
                    self.invalidate(number * BLOCK, BLOCK)
            write_all(self.changes, buf, offset)

    def flush(self):
        """Make the blocks and the index durable, including writes of an earlier server."""
        self.changes_sync.sync()
        self.index_sync.sync()
