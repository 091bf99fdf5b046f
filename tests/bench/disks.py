# SPDX-License-Identifier: MIT OR Apache-2.0
"""Serves a Python disk for a measurement until standard input ends: `disks.py CLASS [COALESCE_USECS]`."""

import os
import sys

from handlers import Batch, Null, Sleeping, SleepingTasks, Tasks

import ublk

sys.path.insert(0, "/opt/ublk/examples")
from ramdisk import RamDisk

SIZE = int(os.environ["SIZE"])
START = {"queues": int(os.environ["QUEUES"]), "depth": int(os.environ["DEPTH"])}


class Mapped(ublk.BlockDevice):
    """Stored in a file."""

    def __init__(self, size):
        super().__init__(size=size)
        self.file = os.open(os.environ["FILE"], os.O_RDWR | os.O_DIRECT)

    def map(self, op, offset, length):
        return ublk.Extent(self.file, 0, self.size, start=0, stable=True)


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
