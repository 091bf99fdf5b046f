# SPDX-License-Identifier: MIT OR Apache-2.0
"""Requests that wait together behind one that its handler holds up."""

from collections.abc import Callable, Iterable

from . import sysfs
from .blockio import SECTOR, Disk, Tasks
from .server import Server
from .waiting import until

# Where `Blocking` of disks.py waits until its gate is set.
GATE = 1000 * SECTOR


def wait_behind(server: Server, disk: Disk, work: Iterable[Callable[[int], object]]) -> Tasks:
    """Start a task for each piece of work, which gets a place on the disk; return when all wait with a request."""
    tasks = Tasks()
    tasks.start(lambda: disk.read(GATE, SECTOR))
    assert server.ask("disk.waiting.wait(10)") is True
    count = 1
    for index, piece in enumerate(work):
        # Not side by side: a scheduler may merge neighbours, and there would be fewer requests.
        tasks.start(piece, 2 * index * SECTOR)
        count += 1
    # Other processes, such as udev, may read as well.
    until(lambda: sysfs.in_flight(server.path) >= count, f"{count} requests in flight")
    return tasks
