# SPDX-License-Identifier: MIT OR Apache-2.0

"""Detection of programs that use the disk that they serve.

That works as long as the threads that use the disk are not needed to serve it. But a thread that waits for a disk
cannot be killed: if it waits for its own process, and that process dies or does not answer, neither of them ends.

The functions read only ``/proc`` and ``/sys``, since another file system may be the one that does not answer.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

_PROCESS = Path("/proc/self")


def own_descriptors(path: str) -> dict[int, str]:
    """Return this process's descriptors of a disk: its node, those of its partitions, and files on it."""
    node = re.compile(rf"{re.escape(path)}(p[0-9]+)?( \(deleted\))?")
    mounts = _mounts_of(os.path.basename(path))
    found = {}
    for entry in _entries(_PROCESS / "fd"):
        try:
            target = os.readlink(_PROCESS / "fd" / entry)
            if node.fullmatch(target) or (mounts and _mount_of(entry) in mounts):
                found[int(entry)] = target
        except OSError:
            # Closed meanwhile.
            continue
    return found


def _mounts_of(disk: str) -> set[str]:
    """Return the IDs of the mounts of a disk and its partitions."""
    found: set[str] = set()
    try:
        lines = (_PROCESS / "mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        mount, _parent, number = line.split()[:3]
        if _disk_of(number) == disk:
            found.add(mount)
    return found


def _mount_of(descriptor: str) -> str:
    """Return the ID of the mount that an open file is on."""
    text = (_PROCESS / "fdinfo" / descriptor).read_text(errors="replace")
    numbers = [line.split()[1] for line in text.splitlines() if line.startswith("mnt_id:")]
    return numbers[0] if numbers else ""


def _disk_of(number: str) -> str:
    """Return the name of the disk that MAJOR:MINOR is, or is a partition of; empty if it is not a block device."""
    try:
        parts = os.readlink(f"/sys/dev/block/{number}").split("/")
    except OSError:
        return ""
    # .../block/ublkb0 or .../block/ublkb0/ublkb0p1
    return parts[parts.index("block") + 1] if "block" in parts[:-1] else ""


def blocked_threads() -> dict[int, str]:
    """Return the names of this process's threads in uninterruptible sleep, which usually wait for a disk, by ID."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    found = {}
    for entry in _entries(_PROCESS / "task"):
        try:
            # The name may contain any characters, including parentheses.
            state = (_PROCESS / "task" / entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            continue
        if state == "D":
            found[int(entry)] = f"{names.get(int(entry), 'thread')} ({entry})"
    return found


def descriptor_in_use(thread: int) -> int | None:
    """Return the descriptor that a blocked thread's system call uses, or None if it is unknown.

    Calls that read, write and sync have it as their first argument; other calls that wait for a device have larger
    numbers there. A thread that waits in a page fault, or for a path, has none.
    """
    try:
        # The number of the call and its arguments; -1 outside of a call; "running" if it is not blocked any more.
        words = (_PROCESS / "task" / str(thread) / "syscall").read_text().split()
        return int(words[1], 16) if len(words) > 3 else None
    except (OSError, ValueError):
        return None


def _entries(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []
