# SPDX-License-Identifier: MIT OR Apache-2.0

"""Handlers that hang are reported, with what they are at."""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from typing import TYPE_CHECKING

from ublk._log import log

if TYPE_CHECKING:
    from collections.abc import Callable

    from ublk._ublk import NativeDevice

_wake = threading.Condition()
_watched: dict[NativeDevice, _Watched] = {}
_thread: threading.Thread | None = None


class _Watched:
    """A device that is looked at now and then."""

    def __init__(self, path: str, seconds: float, tasks: Callable[[], list[tuple[int, float, str]]]) -> None:
        self.path = path
        self.seconds = seconds
        self.tasks = tasks
        self.reported: set[tuple[int, int]] = set()


def watch(native: NativeDevice, path: str, seconds: float, tasks: Callable[[], list[tuple[int, float, str]]]) -> None:
    """Report handlers of a device that take so many seconds, once each.

    ``tasks`` tells the requests that tasks serve: a number, seconds, and the task's stack.
    """
    global _thread
    with _wake:
        _watched[native] = _Watched(path, seconds, tasks)
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(target=_run, name="ublk-watch", daemon=True)
            _thread.start()
        _wake.notify()


def forget(native: NativeDevice) -> None:
    """Look at a device no more."""
    with _wake:
        _watched.pop(native, None)
        _wake.notify()


def _in_forked_child() -> None:
    """Forget the parent's devices, and the lock that one of its threads may have held."""
    global _wake, _thread
    _wake = threading.Condition()
    _watched.clear()
    _thread = None


os.register_at_fork(after_in_child=_in_forked_child)


def _run() -> None:
    while True:
        with _wake:
            if not _watched:
                _wake.wait()
                continue
            shortest = min(watched.seconds for watched in _watched.values())
            # Some cannot be waited for, infinity say.
            _wake.wait(min(shortest / 2, threading.TIMEOUT_MAX))
            devices = list(_watched.items())
        for native, watched in devices:
            _look(native, watched)


def _look(native: NativeDevice, watched: _Watched) -> None:
    frames = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    calls = set()
    for thread, call, seconds in native.busy():
        key = (thread, call)
        calls.add(key)
        if seconds >= watched.seconds and key not in watched.reported and thread in frames:
            watched.reported.add(key)
            stack = "".join(traceback.format_stack(frames[thread]))
            name = names.get(thread, str(thread))
            log(
                logging.WARNING,
                "%s: a handler has run for %.1f s on thread %s:\n%s",
                watched.path,
                seconds,
                name,
                stack,
            )
    for number, seconds, stack in watched.tasks():
        key = (0, number)
        calls.add(key)
        if seconds >= watched.seconds and key not in watched.reported:
            watched.reported.add(key)
            log(logging.WARNING, "%s: a task has had a request for %.1f s:\n%s", watched.path, seconds, stack)
    watched.reported &= calls
