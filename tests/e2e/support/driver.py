# SPDX-License-Identifier: MIT OR Apache-2.0
"""The driver as a kernel module."""

import os
from pathlib import Path

from . import udev
from .command import run
from .waiting import until

MODULE = Path("/sys/module/ublk_drv")
CONTROL = Path("/dev/ublk-control")

# The driver of this repository, if the testbed uses it.
_BUNDLED = Path("/opt/ublk/driver/ublk_drv.ko")


def is_bundled() -> bool:
    """Whether the machine runs this repository's driver, not the kernel's own."""
    wanted = os.environ.get("UBLK_DRIVER") == "bundled"
    assert wanted == _BUNDLED.exists(), f"UBLK_DRIVER is {os.environ.get('UBLK_DRIVER')}, {_BUNDLED} says otherwise"
    return wanted


def unload() -> None:
    run(["rmmod", "ublk_drv"])
    until(lambda: not CONTROL.exists(), f"the end of {CONTROL}")


def load() -> None:
    run(["insmod", _BUNDLED] if is_bundled() else ["modprobe", "ublk_drv"])
    until(CONTROL.exists, str(CONTROL))
    udev.settle()
