# SPDX-License-Identifier: MIT OR Apache-2.0
"""udev looks at every new disk, and at every disk that was written to. Its reads must not get
between a test and its disk."""

import os
import time
from pathlib import Path

from .command import run
from .pace import patience
from .waiting import until

_RULE = Path("/run/udev/rules.d/99-ublk-tests.rules")
# File times are as old as the last tick.
_TICK = 0.02


def look_only_at_new_disks() -> None:
    """Keeps udev from looking again when a writer closes a disk."""
    _RULE.parent.mkdir(parents=True, exist_ok=True)
    _RULE.write_text('KERNEL=="ublkb*", OPTIONS+="nowatch"\n')
    run(["udevadm", "control", "--reload"])


def settle() -> None:
    """Waits until udev has looked at everything that is new."""
    run(["udevadm", "settle", f"--timeout={patience(20):g}"])


def now() -> float:
    return time.time() - _TICK


def wait_until_seen(path: str, since: float) -> None:
    """Waits until udev is done with a disk that was made after `since`. (`settle` takes much longer.)"""
    number = os.stat(path).st_rdev
    entry = f"/run/udev/data/b{os.major(number)}:{os.minor(number)}"

    def is_seen() -> bool:
        try:
            return os.stat(entry).st_mtime >= since
        except FileNotFoundError:
            return False

    until(is_seen, f"udev's entry of {path}", 20, step=0.01)
