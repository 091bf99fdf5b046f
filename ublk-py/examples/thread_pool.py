# SPDX-License-Identifier: MIT OR Apache-2.0

"""Slow requests on a pool of threads: they take 10 ms each, like those to a distant store, and overlap.

Run it with ``ublk run thread_pool.py:Slow --size 1G --workers 64``.
"""

import time

import ublk


class Slow(ublk.BlockDevice):
    """RAM disk with a latency of 10 ms."""

    def __init__(self, size):
        super().__init__(size=size)
        self.data = bytearray(size)

    def read(self, offset, buf):
        time.sleep(0.01)
        buf[:] = self.data[offset : offset + len(buf)]

    def write(self, offset, buf):
        time.sleep(0.01)
        self.data[offset : offset + len(buf)] = buf


if __name__ == "__main__":
    with Slow(1 << 30).start(workers=64) as dev:
        print(dev.path)
        dev.wait()
