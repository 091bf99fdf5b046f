# SPDX-License-Identifier: MIT OR Apache-2.0

"""Disk in a numpy array. Arrays over the memory of the requests avoid further copies.

The disk inverts all bits of the data that is written to it, and inverts them again when it is read.

Run it with ``ublk run numpy_disk.py:Flipped --size 1G``.
"""

import numpy

import ublk


class Flipped(ublk.BlockDevice):
    """RAM disk that stores the complement of the written data."""

    def __init__(self, size):
        super().__init__(size=size)
        self.data = numpy.full(size // 8, 0xFFFF_FFFF_FFFF_FFFF, dtype=numpy.uint64)

    def read(self, offset, buf):
        numpy.invert(self.data[offset // 8 :][: len(buf) // 8], out=numpy.frombuffer(buf, dtype=numpy.uint64))

    def write(self, offset, buf):
        numpy.invert(numpy.frombuffer(buf, dtype=numpy.uint64), out=self.data[offset // 8 :][: len(buf) // 8])
