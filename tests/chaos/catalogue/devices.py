# SPDX-License-Identifier: MIT OR Apache-2.0
"""Handlers that meddle with their device."""

import contextlib
import os
import threading
import time

from .case import EITHER, MAY_END, RIGHT, case, right


@case(EITHER, MAY_END)
def stops_its_own_device(disk, op, offset, buf):
    disk.device.stop()
    right(disk, op, offset, buf)


@case(EITHER, MAY_END)
def stops_its_device_in_a_thread(disk, op, offset, buf):
    thread = threading.Thread(target=disk.device.stop, daemon=True)
    thread.start()
    time.sleep(0.5)
    right(disk, op, offset, buf)


@case(RIGHT)
def asks_for_its_statistics(disk, op, offset, buf):
    disk.device.stats()
    right(disk, op, offset, buf)


@case(EITHER)
def invalidates_and_waits(disk, op, offset, buf):
    disk.invalidate(wait=True)
    right(disk, op, offset, buf)


@case(EITHER)
def starts_itself_again(disk, op, offset, buf):
    with contextlib.suppress(Exception):
        disk.start()
    right(disk, op, offset, buf)


@case(EITHER, MAY_END, needs_kernel=True)
def closes_its_char_device(disk, op, offset, buf):
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if "ublkc" in os.readlink(f"/proc/self/fd/{name}"):
                os.close(int(name))
    right(disk, op, offset, buf)
