# SPDX-License-Identifier: MIT OR Apache-2.0

"""Zoned disk in memory: like on shingled disks and ZNS drives, each zone is written sequentially.

Run it with ``ublk run zoned.py:ZonedRam --size 1G``. `ublk.Zoned` does the same without Python.
"""

import errno
import threading

import ublk
from ublk import ZoneCondition

ZONE = 4 << 20


class ZonedRam(ublk.BlockDevice):
    """Disk with zones of 4 MiB in a bytearray; any number of them may be open."""

    def __init__(self, size):
        super().__init__(size=size, block_size=4096, zone_size=ZONE)
        self.data = bytearray(size)
        self.written = [0] * (size // ZONE)
        self.conditions = [ZoneCondition.EMPTY] * (size // ZONE)
        self.lock = threading.Lock()

    def report_zones(self, offset, count):
        with self.lock:
            first = offset // ZONE
            return [
                ublk.Zone(number * ZONE, ZONE, number * ZONE + self.written[number], self.conditions[number])
                for number in range(first, min(first + count, len(self.written)))
            ]

    def read(self, offset, buf):
        buf[:] = self.data[offset : offset + len(buf)]

    def write(self, offset, buf):
        with self.lock:
            if offset != offset // ZONE * ZONE + self.written[offset // ZONE]:
                raise OSError(errno.EIO, "not at the write pointer")
            self.store(offset // ZONE, buf)

    def zone_append(self, offset, buf):
        with self.lock:
            return self.store(offset // ZONE, buf)

    def store(self, number, buf):
        """Write at the write pointer of a zone, and return the offset."""
        place = number * ZONE + self.written[number]
        if self.written[number] + len(buf) > ZONE:
            raise OSError(errno.EIO, "there is not so much room in the zone")
        self.data[place : place + len(buf)] = buf
        self.written[number] += len(buf)
        if self.written[number] == ZONE:
            self.conditions[number] = ZoneCondition.FULL
        elif self.conditions[number] != ZoneCondition.EXPLICITLY_OPEN:
            self.conditions[number] = ZoneCondition.IMPLICITLY_OPEN
        return place

    def zone_open(self, offset):
        with self.lock:
            if self.conditions[offset // ZONE] != ZoneCondition.FULL:
                self.conditions[offset // ZONE] = ZoneCondition.EXPLICITLY_OPEN

    def zone_close(self, offset):
        with self.lock:
            number = offset // ZONE
            if self.conditions[number] in (ZoneCondition.IMPLICITLY_OPEN, ZoneCondition.EXPLICITLY_OPEN):
                empty = self.written[number] == 0
                self.conditions[number] = ZoneCondition.EMPTY if empty else ZoneCondition.CLOSED

    def zone_finish(self, offset):
        with self.lock:
            self.written[offset // ZONE] = ZONE
            self.conditions[offset // ZONE] = ZoneCondition.FULL

    def zone_reset(self, offset):
        with self.lock:
            number = offset // ZONE
            self.data[offset : offset + ZONE] = bytes(ZONE)
            self.written[number] = 0
            self.conditions[number] = ZoneCondition.EMPTY
