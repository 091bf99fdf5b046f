# SPDX-License-Identifier: MIT OR Apache-2.0

"""The library's log, which nothing that the program's log handlers do can turn into a failure of the library."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
import traceback
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("ublk")

# Of messages with the same key, so many are logged in so many seconds; the others are counted.
BURST = 3
INTERVAL = 10.0
# Keys that are remembered.
_KEYS = 256
# For a message of a program that ends, whose stderr may be a full pipe that nothing reads.
_PATIENCE = 1.0
_ending = False
# The last thread that took longer.
_late: threading.Thread | None = None


def log(level: int, message: str, *arguments: object, error: BaseException | None = None) -> None:
    """Log a message, with an exception's traceback.

    What a handler raises is printed to stderr, and goes no further; except that in the main thread Ctrl-C and what
    other signals' handlers raise do. After `end_soon` the main thread waits a second at most.
    """
    if _ending and threading.current_thread() is threading.main_thread():
        in_time(functools.partial(_log, level, message, *arguments, error=error))
    else:
        _log(level, message, *arguments, error=error)


def log_in_time(level: int, message: str, *arguments: object) -> None:
    """Log a message, and wait for that for a second at most."""
    in_time(functools.partial(_log, level, message, *arguments, error=None))


def end_soon() -> None:
    """Let no handler of the log keep the main thread from its end."""
    global _ending
    _ending = True


def in_time(write: Callable[[], object], *, always: bool = False) -> None:
    """Write something, and wait for that for a second at most.

    Nothing is written while an earlier one still waits, unless ``always``.
    """
    global _late
    if not always and _late is not None and _late.is_alive():
        return
    thread = threading.Thread(target=write, name="ublk-log", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        # There are no threads any more, or no memory for one.
        write()
        return
    _late = thread
    thread.join(_PATIENCE)


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
    # There may be no stderr.
    with contextlib.suppress(Exception):
        traceback.print_exc()


class Limiter:
    """Counts messages of a kind that comes too often to log all of them. Usable from any thread."""

    def __init__(self) -> None:
        # While it is held, a finalizer may have something to report, too.
        self._lock = threading.RLock()
        # By key: when the present interval began, how many were logged in it, and how many were left out since.
        self._seen: dict[object, list[float]] = {}
        _limiters.add(self)

    def admit(self, key: object) -> int | None:
        """Return how many messages of this kind were left out before this one, or None to leave it out, too."""
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
        """Return how many messages were left out and not counted in a later one, by key; and forget them."""
        with self._lock:
            rest = {key: int(seen[2]) for key, seen in self._seen.items() if seen[2]}
            self._seen.clear()
        return rest


_limiters: weakref.WeakSet[Limiter] = weakref.WeakSet()


def _in_forked_child() -> None:
    """Replace locks that a thread of the parent may have held."""
    global _ending, _late
    _ending, _late = False, None
    for limiter in _limiters:
        limiter._lock = threading.RLock()


os.register_at_fork(after_in_child=_in_forked_child)


def also(left_out: int) -> str:
    """Return what a message says of those that were left out before it."""
    return f" ({left_out} more since the last report)" if left_out else ""
