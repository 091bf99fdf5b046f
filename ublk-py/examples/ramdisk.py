# SPDX-License-Identifier: MIT OR Apache-2.0

"""RAM disk: the smallest useful block device.

Run it with ``ublk run ramdisk.py:RamDisk --size 1G``, or as a script.
"""

import ublk


class RamDisk(ublk.BlockDevice):
    """Disk in memory."""

    def __init__(self, size):
        super().__init__(size=size, block_size=512)
        # Slices of a memoryview are not copies.
        self.data = memoryview(bytearray(size))

    def read(self, offset, buf):
        buf[:] = self.data[offset : offset + len(buf)]

    def write(self, offset, buf):
        self.data[offset : offset + len(buf)] = buf


if __name__ == "__main__":
    ublk.run(RamDisk(1 << 30))
