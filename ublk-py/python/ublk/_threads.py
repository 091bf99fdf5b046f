# SPDX-License-Identifier: MIT OR Apache-2.0

"""Threads that serve requests."""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# None of them may wait for requests, which might be its own.
threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()

# Reentrant: signal handlers and finalizers, which may start threads, may run while it is held.
_lock = threading.RLock()


def running() -> list[threading.Thread]:
    """Return the threads that have not ended."""
    with _lock:
        while True:
            # Fails if a signal handler starts a thread meanwhile.
            with contextlib.suppress(RuntimeError):
                return list(threads)


def in_forked_child() -> None:
    """Forget the parent's threads, and the lock that one of them may have held."""
    global _lock
    _lock = threading.RLock()
    threads.clear()


def spawn(name: str, body: Callable[[], None]) -> None:
    """Start a thread that serves requests."""
    # A daemon: the interpreter joins other threads before it runs exit handlers, one of which stops the devices that
    # are still running and joins these threads.
    thread = threading.Thread(target=body, name=name, daemon=True)
    with _lock:
        threads.add(thread)
    thread.start()
