# SPDX-License-Identifier: MIT OR Apache-2.0
"""The Python disks that are measured: `disks.py CLASS [COALESCE_USECS]` serves one until its standard input ends."""

import asyncio
import os
import sys
import time

import ublk

sys.path.insert(0, "/opt/ublk/examples")
from ramdisk import RamDisk

SIZE = int(os.environ["SIZE"])
START = {"queues": int(os.environ["QUEUES"]), "depth": int(os.environ["DEPTH"])}


class Null(ublk.BlockDevice):
    """Does nothing."""

    def read(self, offset, buf):
        pass

    def write(self, offset, buf):
        pass


class Tasks(Null):
    """Does nothing, in coroutines."""

    async def read(self, offset, buf):
        pass

    async def write(self, offset, buf):
        pass


class Batch(ublk.BlockDevice):
    """Does nothing, for all requests of a wake-up."""

    def handle(self, requests):
        for request in requests:
            request.complete()


class Mapped(ublk.BlockDevice):
    """Lies in a file."""

    def __init__(self, size):
        super().__init__(size=size)
        self.file = os.open(os.environ["FILE"], os.O_RDWR | os.O_DIRECT)

    def map(self, op, offset, length):
        return ublk.Extent(self.file, 0, self.size, start=0, stable=True)


class Sleeping(ublk.BlockDevice):
    """Takes 10 ms for each request."""

    def read(self, offset, buf):
        time.sleep(0.01)


class SleepingTasks(ublk.BlockDevice):
    """Takes as long, in coroutines."""

    async def read(self, offset, buf):
        await asyncio.sleep(0.01)


KINDS = {
    "Null": (Null, {}),
    "Ram": (RamDisk, {}),
    "Workers": (Null, {"workers": 2}),
    "Tasks": (Tasks, {}),
    "Batch": (Batch, {}),
    "Mapped": (Mapped, {}),
    "Isolated": (Null, {"isolated": True}),
    "Sleeping": (Sleeping, {}),
    "SleepingWorkers": (Sleeping, {"workers": 64}),
    "SleepingTasks": (SleepingTasks, {}),
}


def main():
    kind, more = KINDS[sys.argv[1]]
    disk = kind(SIZE) if kind in (RamDisk, Mapped) else kind(size=SIZE)
    coalesce_usecs = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with disk.start(**START, **more, coalesce_usecs=coalesce_usecs) as device:
        print(device.path, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
