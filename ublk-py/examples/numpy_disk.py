# SPDX-License-Identifier: MIT OR Apache-2.0

"""A disk that is an array, and arrays straight over requests' memory: no byte is copied twice.

This one flips the bits of whatever is written to it, and flips them back when it is read.

Run it with ``ublk run numpy_disk.py:Flipped --size 1G``.
"""

import numpy

import ublk


class Flipped(ublk.BlockDevice):
    """A RAM disk whose content is the complement of what was written."""

    def __init__(self, size):
        super().__init__(size=size)
        self.data = numpy.full(size // 8, 0xFFFF_FFFF_FFFF_FFFF, dtype=numpy.uint64)

    def read(self, offset, buf):
        numpy.invert(self.data[offset // 8 :][: len(buf) // 8], out=numpy.frombuffer(buf, dtype=numpy.uint64))

    def write(self, offset, buf):
        numpy.invert(numpy.frombuffer(buf, dtype=numpy.uint64), out=self.data[offset // 8 :][: len(buf) // 8])
