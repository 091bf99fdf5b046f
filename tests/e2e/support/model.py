# SPDX-License-Identifier: MIT OR Apache-2.0
"""A disk as it should be: plain memory that the real one is compared with."""

import random

from .blockio import Disk

_SHOWN = 16


class Model:
    """The expected content of a disk."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    def __len__(self) -> int:
        return len(self.data)

    def write(self, disk: Disk, offset: int, data: bytes, **options: int) -> None:
        disk.write(offset, data, **options)
        self.data[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int) -> None:
        self.data[offset : offset + length] = bytes(length)

    def check(
        self, disk: Disk, offset: int = 0, length: int | None = None, *, step: int = 1 << 20, skew: int = 0
    ) -> None:
        """Compares a range of the disk, by default all of it."""
        end = len(self.data) if length is None else offset + length
        for at in range(offset, end, step):
            compare(disk.read(at, min(step, end - at), skew=skew), bytes(self.data[at : min(at + step, end)]), at)


def compare(found: bytes, expected: bytes, offset: int = 0) -> None:
    """Fails with the first place that differs. (A diff of megabytes is useless.)"""
    if found == expected:
        return
    assert len(found) == len(expected), f"{len(found)} bytes at {offset} instead of {len(expected)}"
    first = next(index for index in range(len(found)) if found[index] != expected[index])
    count = sum(a != b for a, b in zip(found, expected, strict=True))
    raise AssertionError(
        f"{count} of {len(found)} bytes at {offset} differ, first at {offset + first}: "
        f"{found[first : first + _SHOWN].hex()} instead of {expected[first : first + _SHOWN].hex()}"
    )


def exercise(
    disk: Disk,
    model: Model,
    *,
    unit: int,
    longest: int,
    steps: int,
    seed: int,
    zeroing: bool = False,
    start: int = 0,
    end: int | None = None,
) -> None:
    """Random reads and writes of `unit` to `longest` bytes, unaligned to pages where `unit` allows it;
    every read is compared, and all of the range at the end."""
    numbers = random.Random(seed)
    end = len(model) if end is None else end
    for _ in range(steps):
        # Short ones as often as long ones.
        length = unit * min(numbers.randint(1, 1 << numbers.randint(0, 12)), longest // unit)
        offset = start + unit * numbers.randint(0, (end - start - length) // unit)
        skew = 512 * numbers.randint(0, 7)
        choice = numbers.random()
        if choice < 0.5:
            model.write(disk, offset, numbers.randbytes(length), skew=skew)
        elif choice < 0.6 and zeroing:
            disk.punch(offset, length)
            model.zero(offset, length)
        else:
            model.check(disk, offset, length, skew=skew, step=longest)
    disk.sync()
    disk.drop_cache()
    model.check(disk, start, end - start)
