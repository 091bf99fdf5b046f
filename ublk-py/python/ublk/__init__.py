# SPDX-License-Identifier: MIT OR Apache-2.0

"""Block devices written in Python, served through Linux's ublk driver.

Subclass `BlockDevice`, override `BlockDevice.read` and the operations that the disk supports, and start it::

    with MyDisk(size).start(queues=2) as dev:
        print(dev.path)
        dev.wait()

`ublk.testing` serves disks without the kernel's driver. The library logs under the logger ``ublk``.
"""

from ublk._block_device import BlockDevice
from ublk._device import Device
from ublk._errors import UblkError
from ublk._file_sync import FileSync
from ublk._native import File, Mem, Null, Zoned
from ublk._requests import Op, Requests
from ublk._start import recover, run
from ublk._stats import OpStats, Stats
from ublk._system import DeviceInfo, SystemDevice, devices, features
from ublk._ublk import Extent, Request, Zeros, __version__
from ublk._zones import Zone, ZoneCondition

__all__ = [
    "BlockDevice",
    "Device",
    "DeviceInfo",
    "Extent",
    "File",
    "FileSync",
    "Mem",
    "Null",
    "Op",
    "OpStats",
    "Request",
    "Requests",
    "Stats",
    "SystemDevice",
    "UblkError",
    "Zeros",
    "Zone",
    "ZoneCondition",
    "Zoned",
    "__version__",
    "devices",
    "features",
    "recover",
    "run",
]
