# SPDX-License-Identifier: MIT OR Apache-2.0

"""The devices of the system, whoever serves them, and what the driver can do."""

from __future__ import annotations

from dataclasses import dataclass

from ublk import _ublk


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What the driver knows about a device, whoever made it."""

    id: int
    path: str
    state: str
    """``LIVE``; ``DEAD`` without a disk; ``QUIESCED`` or ``FAIL_IO`` while its server is gone."""
    pid: int | None
    """The server's process, None without one."""
    queues: int
    depth: int
    size: int
    block_size: int
    max_io_bytes: int
    read_only: bool
    recovery: str | None
    """What becomes of requests when the server is gone: ``queue``, ``reissue`` or ``fail-io``; None if the disk goes
    too."""


class SystemDevice:
    """A device of the system, whoever serves it; made by `open`. Closing it is not needed."""

    def __init__(self, id: int) -> None:
        self.id = id
        """The number N of ``/dev/ublkbN``."""
        self.path: str = self.info.path
        """The block device's node."""

    @property
    def info(self) -> DeviceInfo:
        """What the driver knows about it now. Raises `UblkError` with ``ENODEV`` once it is gone."""
        return DeviceInfo(**_ublk.device(self.id))

    def delete(self, *, force: bool = False) -> None:
        """Stop and delete the device. Raises `UblkError` with ``EBUSY`` if it is open or mounted, unless forced.

        Before Linux 7.0 the driver cannot tell, so that only ``force`` works.
        """
        _ublk.delete(self.id, force)

    def quiesce(self) -> None:
        """Ask its server to finish its requests and leave, and wait until it has. Linux 6.16.

        Requests that come then wait for the next server (`recover`). Only devices that were started with
        ``recoverable`` have that.
        """
        _ublk.quiesce(self.id)

    def resize(self, size: int) -> None:
        """Change the disk's size in bytes while it is in use. Its server must have room; it is not told. Linux 6.16."""
        _ublk.resize(self.id, size)

    def __repr__(self) -> str:
        return f"<ublk.SystemDevice {self.path}>"


def open(id: int) -> SystemDevice:
    """Find a device by its number. Raises `UblkError` with ``ENODEV`` if there is none."""
    return SystemDevice(id)


def devices() -> list[DeviceInfo]:
    """List the devices of the system, whoever made them."""
    return [DeviceInfo(**info) for info in _ublk.devices()]


def features() -> dict[str, bool]:
    """Tell which of the features that this library knows the running driver offers."""
    return _ublk.features()
