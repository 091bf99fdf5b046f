# SPDX-License-Identifier: MIT OR Apache-2.0

"""The interpreter's switch interval, which is lowered while Python serves requests.

A thread that computes keeps the GIL for `sys.getswitchinterval()`, 5 ms by default, after another thread has requested
it. That is the minimum latency of a request then. While devices are running, the interval is 0.5 ms.
"""

from __future__ import annotations

import sys
import threading

SECONDS = 0.0005

_lock = threading.Lock()
_devices: set[object] = set()
_before: float | None = None


def shorten(device: object) -> None:
    """Lower the interval for a device that needs the interpreter, unless the program has set a shorter one."""
    global _before
    with _lock:
        if not _devices and sys.getswitchinterval() > SECONDS:
            _before = sys.getswitchinterval()
            sys.setswitchinterval(SECONDS)
        _devices.add(device)


def restore(device: object) -> None:
    """Restore the interval after the last device, unless the program has changed it."""
    with _lock:
        _devices.discard(device)
        if not _devices:
            _restore()


def _restore() -> None:
    global _before
    if _before is not None and abs(sys.getswitchinterval() - SECONDS) < 1e-6:
        sys.setswitchinterval(_before)
    _before = None


def in_forked_child() -> None:
    """Forget the parent's devices, and the lock that one of its threads may have held."""
    global _lock
    _lock = threading.Lock()
    _devices.clear()
    _restore()
