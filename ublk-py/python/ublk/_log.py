# SPDX-License-Identifier: MIT OR Apache-2.0

"""The library's log, protected from exceptions of the program's log handlers."""

from __future__ import annotations

import contextlib
import functools
import logging
import select
import sys
import threading
import time
import traceback
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("ublk")

# Number of messages with the same key that are logged per interval, in seconds; the others are counted.
BURST = 3
INTERVAL = 10.0
# Maximum number of keys that are remembered.
_KEYS = 256
# Limit for a message of a program that ends, whose stderr may be a full pipe that nothing reads.
_PATIENCE = 1.0
_ending = False
# The last thread that wrote a message, which may have taken longer.
_late: threading.Thread | None = None


def log(level: int, message: str, *arguments: object, error: BaseException | None = None) -> None:
    """Log a message, with an exception's traceback.

    Exceptions of log handlers are printed to stderr and not propagated, except `KeyboardInterrupt` and the like in the
    main thread, which signal handlers raise. After `end_soon` the main thread waits a second at most.
    """
    if _ending and threading.current_thread() is threading.main_thread():
        in_time(functools.partial(_log, level, message, *arguments, error=error))
    else:
        _log(level, message, *arguments, error=error)


def log_in_time(level: int, message: str, *arguments: object) -> None:
    """Log a message, and wait for that for a second at most."""
    in_time(functools.partial(_log, level, message, *arguments, error=None))


def end_soon() -> None:
    """Limit how long log handlers may delay the main thread, which is about to end."""
    global _ending
    _ending = True


def in_time(write: Callable[[], object], *, to: str = "stderr") -> None:
    """Call a function that writes to a standard file, on another thread, and wait for that for a second at most.

    It is not called while an earlier one still writes to stderr, unless it writes to stdout.
    """
    global _late
    if to == "stderr" and _late is not None and _late.is_alive():
        return
    thread = threading.Thread(target=write, name="ublk-log", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        # No thread can be created any more, as at the end of a program on Python 3.12.0 to 3.12.2. A write to a full
        # pipe would never end.
        if not _is_full(to):
            write()
        return
    if to == "stderr":
        _late = thread
    thread.join(_PATIENCE)


def _is_full(name: str) -> bool:
    """Return whether a standard file has no room. A pipe with room takes a page at least."""
    try:
        poll = select.poll()
        poll.register(getattr(sys, f"__{name}__") or {"stdout": 1, "stderr": 2}[name], select.POLLOUT)
        return not poll.poll(0)
    except (OSError, ValueError):
        return False


def _log(level: int, message: str, *arguments: object, error: BaseException | None) -> None:
    try:
        logger.log(level, message, *arguments, exc_info=error, stacklevel=3)
    except Exception:
        _print()
    except BaseException:
        if threading.current_thread() is threading.main_thread():
            raise
        _print()


def _print() -> None:
    with contextlib.suppress(Exception):
        print_error(traceback.format_exc().rstrip("\n"))


def print_error(text: str) -> None:
    """Print a text to stderr, if there is one: `print` would take stdout instead."""
    with contextlib.suppress(Exception):
        # The program may also have deleted it.
        if (stderr := getattr(sys, "stderr", None)) is not None:
            print(text, file=stderr, flush=True)


class Limiter:
    """Rate limiter for log messages, by key. May be used from any thread."""

    def __init__(self) -> None:
        # Reentrant: a finalizer may report something while the lock is held.
        self._lock = threading.RLock()
        # By key: the start of the interval, the number of messages logged in it, and the number left out since.
        self._seen: dict[object, list[float]] = {}
        _limiters.add(self)

    def admit(self, key: object) -> int | None:
        """Return the number of messages left out before this one, or None if this one is to be left out."""
        now = time.monotonic()
        with self._lock:
            if key not in self._seen and len(self._seen) >= _KEYS:
                self._seen.pop(next(iter(self._seen)))
            seen = self._seen.setdefault(key, [now, 0, 0])
            if now - seen[0] >= INTERVAL:
                seen[:2] = [now, 0]
            if seen[1] >= BURST:
                seen[2] += 1
                return None
            seen[1] += 1
            left_out, seen[2] = int(seen[2]), 0
            return left_out

    def rest(self) -> dict[object, int]:
        """Return the number of messages left out since the last logged one, by key, and reset the limiter."""
        with self._lock:
            rest = {key: int(seen[2]) for key, seen in self._seen.items() if seen[2]}
            self._seen.clear()
        return rest


_limiters: weakref.WeakSet[Limiter] = weakref.WeakSet()


def in_forked_child() -> None:
    """Replace locks that a thread of the parent may have held."""
    global _ending, _late
    _ending, _late = False, None
    for limiter in _limiters:
        limiter._lock = threading.RLock()


def also(left_out: int) -> str:
    """Return the part of a message that counts those left out before it."""
    return f" ({left_out} more since the last report)" if left_out else ""
