# SPDX-License-Identifier: MIT OR Apache-2.0
"""What was acknowledged to the clients of a disk, and which contents that leaves possible after a power cut.

Times are nanoseconds of CLOCK_MONOTONIC, which all processes share. Writes of one extent are never under way at the
same time, so their versions are in the order of their times. An acknowledged flush makes durable what was acknowledged
before the flush began, on every queue; so does a write with FUA for itself, and any write to a disk without a volatile
cache.
"""

import bisect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from . import content

SECTOR = content.SECTOR


@dataclass
class Write:
    """One write of an extent."""

    version: int
    began: int
    # None while it is under way, or if it failed: it may or may not have been carried out.
    acked: int | None = None
    # Durable once acknowledged.
    durable: bool = False
    # Its content is zeros.
    zeros: bool = False


@dataclass
class Extent:
    """Sectors that are always written together."""

    first: int
    count: int
    writes: list[Write] = field(default_factory=list)
    # The durable version that `History.check_new` has looked at last.
    checked: int = 0

    @property
    def offset(self) -> int:
        return self.first * SECTOR

    @property
    def length(self) -> int:
        return self.count * SECTOR

    def acked(self) -> int:
        """The newest version that was acknowledged."""
        return max((write.version for write in self.writes if write.acked is not None), default=0)


@dataclass(frozen=True)
class Wrong:
    """A sector that holds what it cannot hold."""

    kind: str
    sector: int
    held: str
    least: int
    most: int

    def __str__(self) -> str:
        return f"sector {self.sector} holds {self.held}; versions {self.least} to {self.most} are possible"


# Kinds of `Wrong`.
LOST = "an acknowledged write is not there"
FOREIGN = "bytes that were never written there"
EARLY = "a version that was not yet written"


class History:
    """The extents of a disk with their writes, and the disk's flushes."""

    def __init__(self, run: int, extents: list[Extent]) -> None:
        self.run = run
        self.extents = extents
        self._lock = threading.Lock()
        # (acked, began), in the order of `acked`.
        self._flushes: list[tuple[int, int]] = []
        # The latest beginning among the first flushes.
        self._latest: list[int] = []

    def flushed(self, began: int, acked: int) -> None:
        """Notes an acknowledged flush."""
        with self._lock:
            bisect.insort(self._flushes, (acked, began))
            self._latest.clear()

    def moments(self) -> list[int]:
        """The times at which something became durable."""
        durable = [write.acked for extent in self.extents for write in extent.writes if write.durable and write.acked]
        return sorted([acked for acked, _ in self._flushes] + durable)

    def _flushed_before(self, cut: int) -> int:
        """The time before which acknowledged writes are durable at a cut."""
        if len(self._latest) != len(self._flushes):
            latest = 0
            for _, began in self._flushes:
                latest = max(latest, began)
                self._latest.append(latest)
        count = bisect.bisect_right(self._flushes, (cut, 1 << 63))
        return self._latest[count - 1] if count else 0

    def possible(self, extent: Extent, cut: int) -> tuple[int, dict[int, Write]]:
        """The version that is durable at a cut, and those that may be there, that one included."""
        flushed = self._flushed_before(cut)
        least = 0
        for write in extent.writes:
            if write.acked is not None and (write.acked <= flushed or (write.durable and write.acked <= cut)):
                least = write.version
        begun = {write.version: write for write in extent.writes if write.began <= cut}
        return least, {version: write for version, write in begun.items() if version >= least}

    def check(self, extent: Extent, cut: int, data: bytes) -> list[Wrong]:
        """What is wrong with an extent's content after a cut. Sectors of a write may survive one by one."""
        least, possible = self.possible(extent, cut)
        return self._compare(extent, data, least, possible)

    def check_live(self, extent: Extent, data: bytes) -> list[Wrong]:
        """What is wrong with an extent's content on a disk that has lost nothing, while no write is under way.

        Writes that failed may have been carried out, but not after a newer one was acknowledged.
        """
        least = extent.acked()
        possible = {write.version: write for write in extent.writes if write.version >= least}
        return self._compare(extent, data, least, possible)

    def _compare(self, extent: Extent, data: bytes, least: int, possible: dict[int, Write]) -> list[Wrong]:
        most = max(possible, default=0)
        zeros = least == 0 or any(write.zeros for write in possible.values())
        known = {write.version for write in extent.writes}
        wrong = []
        for index in range(extent.count):
            number = extent.first + index
            held = data[index * SECTOR : (index + 1) * SECTOR]
            version = content.version_of(self.run, number, held)
            if version == 0:
                kind = "" if zeros else LOST
            elif version is None or version not in known:
                kind = FOREIGN
            elif version < least:
                kind = LOST
            elif version > most:
                kind = EARLY
            else:
                kind = FOREIGN if possible[version].zeros else ""
            if kind:
                wrong.append(Wrong(kind, number, content.describe(held), least, most))
        return wrong

    def check_all(self, cut: int, read: Callable[[int, int], bytes]) -> list[Wrong]:
        """What is wrong with all extents after a cut; `read` takes an offset and a length."""
        return [
            wrong for extent in self.extents for wrong in self.check(extent, cut, read(extent.offset, extent.length))
        ]

    def check_new(self, cut: int, read: Callable[[int, int], bytes]) -> list[Wrong]:
        """What is wrong after a cut with extents of which newer versions are durable than at the cut before."""
        wrong = []
        for extent in self.extents:
            least, possible = self.possible(extent, cut)
            if least > extent.checked:
                extent.checked = least
                wrong += self._compare(extent, read(extent.offset, extent.length), least, possible)
        return wrong
