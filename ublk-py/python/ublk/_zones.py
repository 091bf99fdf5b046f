# SPDX-License-Identifier: MIT OR Apache-2.0

"""Zones of zoned disks."""

from __future__ import annotations

import enum
import itertools
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ublk._block_device import BlockDevice

# `struct blk_zone` of linux/blkzoned.h: start, length, write pointer, type, condition, two flags, reserved, capacity,
# reserved; offsets and lengths in sectors.
_LAYOUT = struct.Struct("=QQQBBBB4xQ24x")
_SECTOR = 512


class ZoneCondition(enum.IntEnum):
    """Condition of a zone; the values are the kernel's."""

    CONVENTIONAL = 0
    """Without a write pointer; can be written anywhere."""
    EMPTY = 1
    IMPLICITLY_OPEN = 2
    """Opened by a write."""
    EXPLICITLY_OPEN = 3
    """Opened by a command."""
    CLOSED = 4
    """Partly written, and not open."""
    READ_ONLY = 13
    FULL = 14
    OFFLINE = 15


# Conditions in which a zone has a write pointer.
_WRITABLE = (
    ZoneCondition.EMPTY,
    ZoneCondition.IMPLICITLY_OPEN,
    ZoneCondition.EXPLICITLY_OPEN,
    ZoneCondition.CLOSED,
)


@dataclass(frozen=True, slots=True)
class Zone:
    """One zone of a disk; offsets and lengths in bytes."""

    start: int
    """First byte."""
    length: int
    """The disk's zone size; the last zone may be shorter."""
    write_pointer: int
    """Offset on the disk of the next write; meaningless for conventional and full zones."""
    condition: ZoneCondition
    capacity: int | None = None
    """Number of bytes that can be written; by default all."""

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


def _check(zone: Zone, start: int, size: int, zone_size: int) -> None:
    """Raise `ValueError` for an invalid zone. The kernel rejects most of them, without a reason."""
    length = min(zone_size, size - start)
    capacity = length if zone.capacity is None else zone.capacity
    if zone.start != start:
        raise ValueError(f"report_zones() returned a zone at {zone.start} instead of the one at {start}")
    if zone.length != length:
        raise ValueError(f"report_zones(): the zone at {start} has {length} bytes, not {zone.length}")
    if not 0 < capacity <= length:
        raise ValueError(f"report_zones(): the zone at {start} with {length} bytes has an invalid capacity: {capacity}")
    if zone.condition in _WRITABLE and not start <= zone.write_pointer <= start + capacity:
        raise ValueError(f"report_zones(): the write pointer {zone.write_pointer} is not in the zone at {start}")


def reporter(
    target: BlockDevice, report_zones: Callable[[int, int], Iterable[Zone]]
) -> Callable[[int, memoryview], None]:
    """Return a function that fills the memory of a zone report from a zoned disk's method."""

    def report(offset: int, buf: memoryview) -> None:
        size, zone_size = target.size, target.zone_size
        # A report may be requested from the middle of a zone.
        first = offset - offset % zone_size
        starts = range(first, size, zone_size)[: len(buf) // _LAYOUT.size]
        zones = list(itertools.islice(report_zones(first, len(starts)), len(starts)))
        if len(zones) < len(starts):
            raise ValueError(f"report_zones({first}, {len(starts)}) returned {len(zones)} zones")
        # The kernel takes zeros as the end of the zones.
        buf[:] = bytes(len(buf))
        for number, (start, zone) in enumerate(zip(starts, zones, strict=True)):
            _check(zone, start, size, zone_size)
            buf[number * _LAYOUT.size : (number + 1) * _LAYOUT.size] = zone._pack()

    return report
