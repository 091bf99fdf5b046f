# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a test may not leave behind, and how to remove it when one did."""

import contextlib
import glob
import os
import subprocess
import time
from dataclasses import dataclass, field

from .pace import patience
from .processes import Process, kill, user_processes

_GRACE = 3.0


def _nodes() -> set[str]:
    patterns = ("/dev/ublkb*", "/dev/ublkc*", "/sys/block/ublkb*", "/sys/class/ublk-char/*")
    return {path for pattern in patterns for path in glob.glob(pattern)}


def _mounts() -> set[str]:
    with open("/proc/self/mountinfo") as file:
        return {line.split()[4] for line in file}


def _loops() -> set[str]:
    return {os.path.dirname(os.path.dirname(path)) for path in glob.glob("/sys/block/loop*/loop/backing_file")}


@dataclass
class Residue:
    """What is there now that was not there before."""

    nodes: set[str] = field(default_factory=set)
    processes: set[Process] = field(default_factory=set)
    mounts: set[str] = field(default_factory=set)
    loops: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.nodes or self.processes or self.mounts or self.loops)

    def __str__(self) -> str:
        parts = [sorted(self.nodes), sorted(map(str, self.processes)), sorted(self.mounts), sorted(self.loops)]
        return "; ".join(
            f"{name}: {', '.join(part)}"
            for name, part in zip(("nodes", "processes", "mounts", "loop devices"), parts, strict=True)
            if part
        )


class Snapshot:
    """The machine before a test."""

    def __init__(self) -> None:
        self._nodes = _nodes()
        self._processes = user_processes()
        self._mounts = _mounts()
        self._loops = _loops()

    def new_processes(self) -> set[Process]:
        return user_processes() - self._processes

    def residue(self) -> Residue:
        return Residue(_nodes() - self._nodes, self.new_processes(), _mounts() - self._mounts, _loops() - self._loops)

    def settled_residue(self) -> Residue:
        """What is left after a moment: udev looks at devices that are on their way out."""
        deadline = time.monotonic() + patience(_GRACE)
        while (found := self.residue()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    def kill_new_processes(self) -> None:
        for process in self.new_processes():
            kill(process.pid)

    def clean(self) -> str:
        """Removes what is left, so that the next test starts clean. Says what it cannot remove."""
        self.kill_new_processes()
        for mount in sorted(_mounts() - self._mounts, reverse=True):
            _bounded("umount", "--lazy", mount)
        for loop in _loops() - self._loops:
            _bounded("losetup", "--detach", f"/dev/{os.path.basename(loop)}")
        _bounded("ublk", "del", "-a", "--force")
        left = self.settled_residue()
        return f"cannot be removed: {left}" if left else ""


def _bounded(*argv: str) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired, OSError):
        subprocess.run(argv, timeout=patience(20), capture_output=True, stdin=subprocess.DEVNULL, check=False)
