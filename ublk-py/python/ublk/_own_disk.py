# SPDX-License-Identifier: MIT OR Apache-2.0

"""Programs that use the disk that they serve.

That is legitimate, as long as the threads that use the disk are not needed to serve it. But a thread that waits for a
disk cannot be killed: if it waits for its own process, and that dies or does not answer, neither ends.

Nothing here asks a file system, which may be the one that does not answer.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

_PROCESS = Path("/proc/self")


def own_descriptors(path: str) -> dict[int, str]:
    """Find what this process has open of a disk: its node, those of its partitions, and files on it."""
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
    """Find the numbers of the mounts that are of a disk or of a partition of it."""
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
    """Return the number of the mount that an open file is on."""
    text = (_PROCESS / "fdinfo" / descriptor).read_text()
    numbers = [line.split()[1] for line in text.splitlines() if line.startswith("mnt_id:")]
    return numbers[0] if numbers else ""


def _disk_of(number: str) -> str:
    """Return the name of the disk that a block device MAJOR:MINOR is, or is a partition of; empty if it is none."""
    try:
        parts = os.readlink(f"/sys/dev/block/{number}").split("/")
    except OSError:
        return ""
    # .../block/ublkb0 or .../block/ublkb0/ublkb0p1
    return parts[parts.index("block") + 1] if "block" in parts[:-1] else ""


def blocked_threads() -> dict[int, str]:
    """Find the threads of this process that wait for a device and cannot be killed until it answers: their names."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    found = {}
    for entry in _entries(_PROCESS / "task"):
        try:
            # The name may have anything in it, parentheses too.
            state = (_PROCESS / "task" / entry / "stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            continue
        if state == "D":
            found[int(entry)] = f"{names.get(int(entry), 'thread')} ({entry})"
    return found


def descriptor_in_use(thread: int) -> int | None:
    """Return the descriptor that a blocked thread's system call is about, if that is known.

    Those that read, write and sync have it as the first argument, where no other call that waits for a device has so
    small a number. A thread that waits because of a page fault, or for a path, has none.
    """
    try:
        # The call's number and its arguments; -1 without a call; "running" if it goes on after all.
        words = (_PROCESS / "task" / str(thread) / "syscall").read_text().split()
        return int(words[1], 16) if len(words) > 3 else None
    except (OSError, ValueError):
        return None


def _entries(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []
