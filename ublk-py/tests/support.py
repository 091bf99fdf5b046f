# SPDX-License-Identifier: MIT OR Apache-2.0

"""Helpers that several modules of tests use."""

import errno
import time

import ublk
from ublk._driver import using
from ublk._ublk import FakeDriver

# More than what takes no time needs on a slow machine.
SOON = 60


def until(condition, seconds=SOON):
    """Wait until a condition holds; fail if that takes longer than it may."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition does not hold in time"
        time.sleep(0.01)


def recover_when_free(id, disk):
    """Recover a device as soon as the driver has finished with its last server."""
    deadline = time.monotonic() + SOON
    while True:
        try:
            return ublk.recover(id, disk)
        except ublk.UblkError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def start_isolated(disk, **options):
    """Start a device in a process of its own, where it is on a stand-in driver."""
    with using(FakeDriver()):
        return disk.start(isolated=True, **options)
