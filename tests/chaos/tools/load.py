# SPDX-License-Identifier: MIT OR Apache-2.0
"""Clients of a disk that note what was acknowledged, and check what they read."""

import fcntl
import mmap
import os
import random
import struct
import threading
import time
from dataclasses import dataclass

from support.blockio import Disk

from . import content
from .history import SECTOR, Extent, History, Write, Wrong

# Lengths of extents, in sectors of 512 bytes.
COUNTS = (1, 8, 8, 8, 24, 32, 128)
BLKRESETZONE = 0x40101283
# How long a client waits after an error before it goes on.
PAUSE = 0.02


def lay_out(dice: random.Random, size: int, clients: int, block: int) -> list[list[Extent]]:
    """Extents for each client, each client's in a part of the disk of its own. Lengths are multiples of `block`."""
    share = size // clients // 65536 * 65536
    parts = []
    for client in range(clients):
        part, at, end = [], client * share, (client + 1) * share
        while len(part) < 12:
            length = max(block, dice.choice(COUNTS) * SECTOR) // block * block
            # Pages of the page cache are one client's alone.
            if at + (length + 4095) // 4096 * 4096 > end:
                break
            part.append(Extent(at // SECTOR, length // SECTOR))
            at += (length + 4095) // 4096 * 4096
        parts.append(part)
    return parts


def lay_out_zones(size: int, zone: int, chunk: int, clients: int) -> list[list[list[Extent]]]:
    """Zones for each client, each of them a list of chunks."""
    zones = [
        [Extent(at // SECTOR, chunk // SECTOR) for at in range(start, start + zone, chunk)]
        for start in range(0, size, zone)
    ]
    return [zones[client::clients] for client in range(clients)]


@dataclass
class Counts:
    """What a client has done."""

    writes: int = 0
    durable: int = 0
    flushes: int = 0
    reads: int = 0
    errors: int = 0

    def all(self) -> int:
        return self.writes + self.flushes + self.reads + self.errors


class Client(threading.Thread):
    """Writes, flushes and reads its extents, one request at a time, until it is stopped."""

    def __init__(
        self,
        path: str,
        history: History,
        part: list[Extent],
        seed: str,
        *,
        cpu: int,
        direct: bool = True,
        cached: bool = True,
        zeros: bool = False,
        pages_may_be_lost: bool = False,
    ) -> None:
        """`pages_may_be_lost`: requests may fail, also those that write pages of the page cache back."""
        super().__init__(daemon=True)
        self._path = path
        self._history = history
        self._part = part
        self._dice = random.Random(seed)
        self._cpu = cpu
        self._direct = direct
        # Without a volatile cache every direct write is durable when it is acknowledged.
        self._durable = direct and not cached
        self._zeros = zeros
        # Writes to the page cache of which a failure is reported by this client's next sync, to this client only.
        self._unsure: list[Write] | None = [] if pages_may_be_lost and not direct else None
        self._over = threading.Event()
        self._may_work = threading.Event()
        self._may_work.set()
        self._sync_next = False
        self.resting = False
        self._memory = mmap.mmap(-1, 1 << 20)
        self.counts = Counts()
        self.wrong: list[Wrong] = []
        self.errors: list[tuple[int, OSError]] = []
        self.last = time.monotonic()

    def stop(self) -> None:
        self._over.set()
        self._may_work.set()

    def rest(self) -> None:
        """Have no request under way from some moment on (`resting`), until `resume`."""
        self._may_work.clear()

    def resume(self) -> None:
        """Go on with a sync: what was acknowledged before the rest may not be durable yet."""
        self._sync_next = True
        self._may_work.set()

    def _wait_for_work(self) -> None:
        if not self._may_work.is_set():
            self.resting = True
            self._may_work.wait()
            self.resting = False

    def run(self) -> None:
        os.sched_setaffinity(threading.get_native_id(), {self._cpu % (os.cpu_count() or 1)})
        while not self._over.is_set():
            try:
                with Disk(self._path, direct=self._direct) as disk:
                    while not self._over.is_set():
                        self._wait_for_work()
                        self._step(disk)
                        self.last = time.monotonic()
            except OSError as error:
                self.counts.errors += 1
                self.errors.append((time.monotonic_ns(), error))
                if self._unsure is not None:
                    # They may or may not have been carried out.
                    self._unsure.clear()
                time.sleep(PAUSE)

    def _step(self, disk: Disk) -> None:
        what = self._dice.random()
        extent = self._dice.choice(self._part)
        if what < 0.2 or self._sync_next:
            self._sync_next = False
            began = time.monotonic_ns()
            disk.sync()
            self._synced(began)
            self.counts.flushes += 1
        elif what < 0.35:
            self._check(disk, extent)
        else:
            self._write(disk, extent, durable=what < 0.5, zeros=self._zeros and what > 0.93)

    def _synced(self, began: int) -> None:
        acked = time.monotonic_ns()
        self._history.flushed(began, acked)
        for write in self._unsure or []:
            write.acked, write.durable = acked, True
        if self._unsure is not None:
            self._unsure.clear()

    def _write(self, disk: Disk, extent: Extent, *, durable: bool, zeros: bool) -> None:
        number = len(extent.writes) + 1
        data = bytes(extent.length) if zeros else content.sectors(self._history.run, extent.first, extent.count, number)
        durable = durable and not zeros
        write = Write(number, time.monotonic_ns(), durable=durable or (self._durable and not zeros), zeros=zeros)
        extent.writes.append(write)
        if zeros:
            disk.zero_range(extent.offset, extent.length)
        else:
            view = memoryview(self._memory)[: extent.length]
            view[:] = data
            done = os.pwritev(disk.fd, [view], extent.offset, os.RWF_DSYNC if durable else 0)
            if done != extent.length:
                raise OSError(5, f"{done} bytes written of {extent.length}")
        if self._unsure is None or write.durable:
            write.acked = time.monotonic_ns()
        else:
            self._unsure.append(write)
        self.counts.writes += 1
        self.counts.durable += durable

    def _check(self, disk: Disk, extent: Extent) -> None:
        data = disk.read(extent.offset, extent.length)
        if len(data) != extent.length:
            raise OSError(5, f"{len(data)} bytes read of {extent.length}")
        self.counts.reads += 1
        self.wrong += self._history.check_live(extent, data)


class ZoneClient(Client):
    """The same on zones: chunks are written one after the other at the write pointer, and full zones are reset.

    A chunk is an extent; a reset is a write of zeros to all of a zone's chunks.
    """

    def __init__(self, path: str, history: History, zones: list[list[Extent]], seed: str, *, cpu: int) -> None:
        super().__init__(path, history, [chunk for zone in zones for chunk in zone], seed, cpu=cpu)
        self._zones = zones
        # The next chunk of each zone; None after an error, when only a reset helps.
        self._next: list[int | None] = [0] * len(zones)

    def _write(self, disk: Disk, extent: Extent, *, durable: bool, zeros: bool) -> None:
        index = self._dice.randrange(len(self._zones))
        zone, at = self._zones[index], self._next[index]
        self._next[index] = None
        if at is None or at == len(zone):
            self._reset(disk, zone)
            self._next[index] = 0
        else:
            super()._write(disk, zone[at], durable=durable, zeros=False)
            self._next[index] = at + 1

    def _reset(self, disk: Disk, zone: list[Extent]) -> None:
        began = time.monotonic_ns()
        resets = []
        for chunk in zone:
            resets.append(Write(len(chunk.writes) + 1, began, zeros=True))
            chunk.writes.append(resets[-1])
        sectors = sum(chunk.count for chunk in zone)
        fcntl.ioctl(disk.fd, BLKRESETZONE, struct.pack("QQ", zone[0].first, sectors))
        acked = time.monotonic_ns()
        for reset in resets:
            reset.acked = acked
        self.counts.writes += 1
