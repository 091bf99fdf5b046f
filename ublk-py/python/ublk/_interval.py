# SPDX-License-Identifier: MIT OR Apache-2.0

"""How long a thread that computes may keep the interpreter from those that serve requests.

CPython lets it go on for `sys.getswitchinterval()`, 5 ms by default, each time another thread wants to enter: that is
what a request then takes at least. While devices run it is a tenth of that.
"""

from __future__ import annotations

import sys
import threading

SECONDS = 0.0005

_lock = threading.Lock()
_devices: set[object] = set()
_before: float | None = None


def shorten(device: object) -> None:
    """A device runs that needs the interpreter. What the program has made shorter stays so."""
    global _before
    with _lock:
        if not _devices and sys.getswitchinterval() > SECONDS:
            _before = sys.getswitchinterval()
            sys.setswitchinterval(SECONDS)
        _devices.add(device)


def restore(device: object) -> None:
    """A device has stopped, perhaps the last one. What the program has set meanwhile stays so."""
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
