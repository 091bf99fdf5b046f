# SPDX-License-Identifier: MIT OR Apache-2.0

"""Devices of the system, and features of the driver."""

from __future__ import annotations

from dataclasses import dataclass

from ublk import _ublk


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """Information about a device of the system, as the driver reports it."""

    id: int
    path: str
    state: str
    """``LIVE``, ``DEAD`` (without a disk), ``QUIESCED`` or ``FAIL_IO`` (without a server)."""
    pid: int | None
    """Process ID of the server; None without one."""
    queues: int
    depth: int
    size: int
    block_size: int
    max_io_bytes: int
    read_only: bool
    recovery: str | None
    """Recovery mode ``queue``, ``reissue`` or ``fail-io``; None if the device is removed with its server."""


class SystemDevice:
    """Device ``/dev/ublkbN`` of the system, whichever process serves it.

    ``SystemDevice(N)`` raises `UblkError` with ``ENODEV`` if there is none. It need not be closed.
    """

    def __init__(self, id: int) -> None:
        self.id = id
        """The number N of ``/dev/ublkbN``."""
        self.path: str = self.info.path
        """Path of the block device."""

    @property
    def info(self) -> DeviceInfo:
        """Current information about the device. Raises `UblkError` with ``ENODEV`` if it does not exist any more."""
        return DeviceInfo(**_ublk.device(self.id))

    def delete(self, *, force: bool = False) -> None:
        """Stop and delete the device. Raises `UblkError` with ``EBUSY`` if it is open or mounted, unless ``force``.

        Before Linux 7.0 the driver cannot detect that, and ``force`` is required.
        """
        _ublk.delete(self.id, force)

    def quiesce(self) -> None:
        """Ask the server to complete its requests and leave, and wait until it has. Linux 6.16.

        Later requests wait for a new server (`recover`). Only for ``recoverable`` devices.
        """
        _ublk.quiesce(self.id)

    def resize(self, size: int) -> None:
        """Change the size of the disk in bytes while it is in use. Linux 6.16.

        The server must have room for it, and is not notified.
        """
        _ublk.resize(self.id, size)

    def __repr__(self) -> str:
        return f"<ublk.SystemDevice {self.path}>"


def devices() -> list[DeviceInfo]:
    """Return the devices of the system, whichever process serves them."""
    return [DeviceInfo(**info) for info in _ublk.devices()]


def features() -> dict[str, bool]:
    """Return which features the running driver supports, by name."""
    return _ublk.features()
