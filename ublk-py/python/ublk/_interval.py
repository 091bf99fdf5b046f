# SPDX-License-Identifier: MIT OR Apache-2.0

"""The interpreter's switch interval, which is lowered while Python serves requests.

A thread that computes keeps the GIL for `sys.getswitchinterval()`, 5 ms by default, after another thread has requested
it. That is the minimum latency of a request then. While devices are running, the interval is 0.5 ms.
"""

from __future__ import annotations

import sys
import threading

SECONDS = 0.0005

# Reentrant: signal handlers and finalizers, which may start and stop devices, may run while it is held.
_lock = threading.RLock()
_devices: set[object] = set()
# The program's own interval, while it is lowered.
_before: float | None = None


def shorten(device: object) -> None:
    """Lower the interval for a device that needs the interpreter, unless the program has set a shorter one."""
    with _lock:
        _devices.add(device)
        _adjust()


def restore(device: object) -> None:
    """Restore the interval after the last device, unless the program has changed it."""
    with _lock:
        _devices.discard(device)
        if not _devices:
            _adjust()


def _adjust() -> None:
    while True:
        lowered = bool(_devices)
        if lowered:
            _lower()
        else:
            _restore()
        # A signal handler may have started or stopped a device meanwhile.
        if lowered == bool(_devices):
            return


def _lower() -> None:
    global _before
    present = sys.getswitchinterval()
    if _before is None and present > SECONDS:
        _before = present
        sys.setswitchinterval(SECONDS)


def _restore() -> None:
    global _before
    before, _before = _before, None
    if before is not None and abs(sys.getswitchinterval() - SECONDS) < 1e-6:
        sys.setswitchinterval(before)


def in_forked_child() -> None:
    """Forget the parent's devices, and the lock that one of its threads may have held."""
    global _lock
    _lock = threading.RLock()
    _devices.clear()
    _restore()
