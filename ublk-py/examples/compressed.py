# SPDX-License-Identifier: MIT OR Apache-2.0

"""RAM disk that stores its blocks compressed, and may be larger than the memory if the data compresses well.

Run it with ``ublk run compressed.py:Compressed --size 4G``.
"""

import threading
import zlib

import ublk

BLOCK = 65536


class Compressed(ublk.BlockDevice):
    """Disk of 64 KiB blocks, each of them compressed; unwritten blocks use no memory."""

    def __init__(self, size):
        super().__init__(size=size, block_size=4096, max_io_bytes=BLOCK, discard_granularity=BLOCK)
        self.blocks = {}
        self.lock = threading.Lock()

    def load(self, number):
        packed = self.blocks.get(number)
        return bytearray(BLOCK) if packed is None else bytearray(zlib.decompress(packed))

    def pieces(self, offset, length):
        """Divide a range into blocks: number, offset in the block, offset in the range, length."""
        done = 0
        while done < length:
            number, inside = divmod(offset + done, BLOCK)
            count = min(BLOCK - inside, length - done)
            yield number, inside, done, count
            done += count

    def read(self, offset, buf):
        for number, inside, at, count in self.pieces(offset, len(buf)):
            with self.lock:
                packed = self.blocks.get(number)
            block = bytes(BLOCK) if packed is None else zlib.decompress(packed)
            buf[at : at + count] = block[inside : inside + count]

    def write(self, offset, buf):
        for number, inside, at, count in self.pieces(offset, len(buf)):
            with self.lock:
                block = self.load(number)
                block[inside : inside + count] = buf[at : at + count]
                self.blocks[number] = zlib.compress(block, 1)

    def discard(self, offset, length):
        for number, _inside, _at, count in self.pieces(offset, length):
            if count == BLOCK:
                with self.lock:
                    self.blocks.pop(number, None)
