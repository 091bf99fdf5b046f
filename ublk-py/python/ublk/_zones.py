# SPDX-License-Identifier: MIT OR Apache-2.0

"""Zones of zoned disks."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# `struct blk_zone` of linux/blkzoned.h: start, length, write pointer, type, condition, two flags, reserved, capacity,
# reserved; places and lengths in sectors.
_LAYOUT = struct.Struct("=QQQBBBB4xQ24x")
_SECTOR = 512


class ZoneCondition(enum.IntEnum):
    """What a zone is ready for; the kernel's numbers."""

    CONVENTIONAL = 0
    """It has no write pointer: anything can be written anywhere."""
    EMPTY = 1
    IMPLICITLY_OPEN = 2
    """Opened by a write."""
    EXPLICITLY_OPEN = 3
    """Opened by a command."""
    CLOSED = 4
    """Written to, and not open."""
    READ_ONLY = 13
    FULL = 14
    OFFLINE = 15


@dataclass(frozen=True, slots=True)
class Zone:
    """One zone of a disk; offsets and lengths in bytes."""

    start: int
    """First byte."""
    length: int
    """The disk's zone size; less for the last zone of some disks."""
    write_pointer: int
    """Where the next write belongs, an offset on the disk; means nothing for conventional and full zones."""
    condition: ZoneCondition
    capacity: int | None = None
    """How many bytes can be written; by default all."""

    def _pack(self) -> bytes:
        conventional = self.condition == ZoneCondition.CONVENTIONAL
        return _LAYOUT.pack(
            self.start // _SECTOR,
            self.length // _SECTOR,
            self.write_pointer // _SECTOR,
            1 if conventional else 2,
            self.condition,
            0,
            0,
            (self.length if self.capacity is None else self.capacity) // _SECTOR,
        )


def reporter(report_zones: Callable[[int, int], Iterable[Zone]]) -> Callable[[int, memoryview], None]:
    """Make a function that fills a report's memory from a class's method."""

    def report(offset: int, buf: memoryview) -> None:
        # The kernel takes zeros for the end of the zones.
        buf[:] = bytes(len(buf))
        for number, zone in zip(
            range(len(buf) // _LAYOUT.size), report_zones(offset, len(buf) // _LAYOUT.size), strict=False
        ):
            buf[number * _LAYOUT.size : (number + 1) * _LAYOUT.size] = zone._pack()

    return report
