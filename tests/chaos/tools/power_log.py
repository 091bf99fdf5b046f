# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a disk with a volatile cache holds after a power cut at any time, made from a log of what reached it.

A write is in the cache from its beginning on. A flush makes stable what ended before the flush began, when the flush
ends. Of everything else, any sectors may survive, in any order.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass

SECTOR = 512

# What becomes of writes that are in the cache: all of them vanish, all survive, whole ones by chance, single sectors by
# chance, or the newest survive while older ones vanish.
NOTHING = "nothing"
MODES = (NOTHING, "everything", "some", "torn", "newest")


@dataclass(frozen=True)
class Entry:
    """A write, or a flush if there is no data."""

    began: int
    ended: int
    offset: int = 0
    data: bytes | None = None


class Image:
    """The content of a disk: a base, and sectors that differ from it."""

    def __init__(self, base: bytearray, changed: dict[int, bytes]) -> None:
        self._base = base
        self._changed = changed

    def read(self, offset: int, length: int) -> bytes:
        parts = []
        for number in range(offset // SECTOR, (offset + length) // SECTOR):
            changed = self._changed.get(number)
            parts.append(self._base[number * SECTOR : (number + 1) * SECTOR] if changed is None else changed)
        return b"".join(parts)

    def write_to(self, path: str) -> None:
        """Makes a file of it."""
        with open(path, "wb") as file:
            file.write(self._base)
            for number, data in self._changed.items():
                file.seek(number * SECTOR)
                file.write(data)


class PowerLog:
    """The log of one disk, and what it held before. Cuts have to be made in the order of their times."""

    def __init__(self, base: bytes, entries: Iterable[Entry]) -> None:
        self._stable = bytearray(base)
        entries = list(entries)
        # In the order in which they were carried out.
        self._writes = sorted((entry for entry in entries if entry.data is not None), key=lambda entry: entry.ended)
        self._flushes = sorted((entry for entry in entries if entry.data is None), key=lambda entry: entry.ended)
        self._flushed = 0
        self._cut = 0

    def cut(self, time: int, dice: random.Random, mode: str) -> Image:
        """The disk after a cut at a time."""
        assert time >= self._cut, "cuts have to be made in the order of their times"
        self._cut = time
        while self._flushes and self._flushes[0].ended <= time:
            self._flushed = max(self._flushed, self._flushes.pop(0).began)
        kept = []
        for entry in self._writes:
            if entry.ended <= self._flushed:
                self._stable[entry.offset : entry.offset + len(entry.data)] = entry.data
            else:
                kept.append(entry)
        self._writes = kept
        return Image(self._stable, self._survivors([entry for entry in kept if entry.began <= time], dice, mode))

    @staticmethod
    def _survivors(cached: list[Entry], dice: random.Random, mode: str) -> dict[int, bytes]:
        changed: dict[int, bytes] = {}
        first = dice.randrange(len(cached) + 1) if mode == "newest" else 0
        for index, entry in enumerate(cached):
            if mode == NOTHING or (mode == "newest" and index < first) or (mode == "some" and dice.random() < 0.5):
                continue
            for start in range(0, len(entry.data), SECTOR):
                if mode != "torn" or dice.random() < 0.5:
                    changed[(entry.offset + start) // SECTOR] = bytes(entry.data[start : start + SECTOR])
        return changed
