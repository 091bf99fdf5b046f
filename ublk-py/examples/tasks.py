# SPDX-License-Identifier: MIT OR Apache-2.0

"""Slow requests with coroutines: any number of them wait concurrently on one thread.

Run it with ``ublk run tasks.py:Slow --size 1G``, or as a script, which serves the disk on its own event loop.
"""

import asyncio
import contextlib

import ublk


class Slow(ublk.BlockDevice):
    """RAM disk with a latency of 10 ms."""

    def __init__(self, size):
        super().__init__(size=size)
        self.data = bytearray(size)

    async def read(self, offset, buf):
        await asyncio.sleep(0.01)
        buf[:] = self.data[offset : offset + len(buf)]

    async def write(self, offset, buf):
        await asyncio.sleep(0.01)
        self.data[offset : offset + len(buf)] = buf


async def main():
    """Serve until Ctrl-C, which cancels this task."""
    async with await Slow(1 << 30).start_async() as dev:
        print(dev.path)
        await dev.wait_async()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
