# SPDX-License-Identifier: MIT OR Apache-2.0
"""Memory that nothing in the kernel points to any more, as the debug kernel finds it. A loss may stay hidden
for a while, because pointers lie about, also in the allocator's own caches: what happens often is found."""

from pathlib import Path

from .pace import DEBUG_KERNEL

_REPORTS = Path("/sys/kernel/debug/kmemleak")


def _scan() -> None:
    # An object is reported by the second scan that finds nothing pointing to it.
    for _ in range(2):
        _REPORTS.write_text("scan")


def forget() -> None:
    """What is lost by now is not reported again."""
    if DEBUG_KERNEL:
        _scan()
        _REPORTS.write_text("clear")


def lost() -> list[str]:
    """What was lost since the last call or `forget`: per piece of memory, who had allocated it."""
    if not DEBUG_KERNEL:
        return []
    _scan()
    reports = _REPORTS.read_text()
    _REPORTS.write_text("clear")
    pieces = reports.split("unreferenced object ")[1:]
    assert bool(reports) == bool(pieces), f"{_REPORTS} has: {reports}"
    return [f"unreferenced object {piece.rstrip()}" for piece in pieces]
