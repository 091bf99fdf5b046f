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
from typing import TYPE_CHECKING, Any

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
        _log_in_time(level, message, *arguments, error=error)
    else:
        _log(level, message, *arguments, error=error)


def log_in_time(level: int, message: str, *arguments: object) -> None:
    """Log a message, and wait for that for a second at most."""
    _log_in_time(level, message, *arguments, error=None)


def _log_in_time(level: int, message: str, *arguments: object, error: BaseException | None) -> None:
    # A thread that waits for room has locks that the end of the interpreter needs.
    if not _handlers_are_full():
        in_time(functools.partial(_log, level, message, *arguments, error=error))


def _handlers_are_full() -> bool:
    """Return whether all log handlers write to files that get no room within a second."""
    deadline = time.monotonic() + _PATIENCE
    handlers: list[object] = []
    source: logging.Logger | None = logger
    try:
        while source is not None:
            handlers += source.handlers
            source = source.parent if source.propagate else None
        return all(_is_full(getattr(handler, "stream", None), deadline) for handler in handlers or [logging.lastResort])
    except Exception:
        # A handler may be any object of the program's.
        return False


def wait_for_late(seconds: float) -> bool:
    """Wait for a message that took longer than it may; return whether it has been written."""
    late = _late
    if late is None:
        return True
    late.join(max(0.0, seconds))
    return not late.is_alive()


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
        if not _is_full(getattr(sys, to, None) or getattr(sys, f"__{to}__", None), time.monotonic()):
            write()
        return
    if to == "stderr":
        _late = thread
    thread.join(_PATIENCE)


def _is_full(file: Any, deadline: float) -> bool:
    """Return whether a file has no room until some time. A pipe with room takes a page at least."""
    try:
        poll = select.poll()
        poll.register(file, select.POLLOUT)
        return not poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
    except Exception:
        # No file of the system, or any object of the program's.
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
    """Print a text to stderr, if there is one, and if it has room within a second.

    `print` would take stdout instead of a missing one.
    """
    with contextlib.suppress(Exception):
        # The program may also have deleted it.
        stderr = getattr(sys, "stderr", None)
        if stderr is not None and not _is_full(stderr, time.monotonic() + _PATIENCE):
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
