# SPDX-License-Identifier: MIT OR Apache-2.0

"""Reports of handlers that hang, with their stacks."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from typing import TYPE_CHECKING

from ublk._log import log
from ublk._own_disk import blocked_threads, descriptor_in_use, own_descriptors

if TYPE_CHECKING:
    from ublk._serving import Native, Serving

_wake = threading.Condition()
_watched: dict[Native, _Watched] = {}
_thread: threading.Thread | None = None


class _Watched:
    """A watched device."""

    def __init__(self, path: str, seconds: float, serving: Serving) -> None:
        self.path = path
        self.seconds = seconds
        self.tasks = serving.tasks
        self.fail = serving.fail_late
        self.reported_threads: set[tuple[int, int]] = set()
        self.reported_tasks: set[int] = set()
        # Whether the log has a warning that the process uses its own disk.
        self.warned = False
        # Threads that waited for the disk at the last check, with the descriptors that they used.
        self.blocked: set[tuple[int, int]] = set()


def watch(native: Native, path: str, seconds: float, serving: Serving) -> None:
    """Report each handler of a device that runs for longer than so many seconds, once."""
    global _thread
    with _wake:
        _watched[native] = _Watched(path, seconds, serving)
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(target=_run, name="ublk-watch", daemon=True)
            _thread.start()
        _wake.notify()


def forget(native: Native) -> None:
    """Stop watching a device."""
    with _wake:
        _watched.pop(native, None)
        _wake.notify()


def in_forked_child() -> None:
    """Forget the parent's devices, and the lock that one of its threads may have held."""
    global _wake, _thread
    _wake = threading.Condition()
    _watched.clear()
    _thread = None


def _run() -> None:
    while True:
        with _wake:
            if not _watched:
                _wake.wait()
                continue
            shortest = min(watched.seconds for watched in _watched.values())
            # A condition cannot wait for longer.
            _wake.wait(min(shortest / 2, threading.TIMEOUT_MAX))
            devices = list(_watched.items())
        for native, watched in devices:
            try:
                _look(native, watched)
            except Exception as error:
                # An exception of the program's objects in a stack. The other devices are still checked.
                log(logging.ERROR, "%s: checking its handlers failed", watched.path, error=error)


def _look(native: Native, watched: _Watched) -> None:
    descriptors = own_descriptors(watched.path)
    if descriptors and not watched.warned:
        watched.warned = True
        log(
            logging.WARNING,
            "%s: this process serves the disk and has it open as descriptor %s: if it is killed while a thread waits"
            " for the disk, it may never end; use the disk from another process",
            watched.path,
            ", ".join(f"{number} ({target})" for number, target in descriptors.items()),
        )
    late = _report_threads(native, watched) | _report_tasks(watched)
    names = blocked_threads() if late and descriptors else {}
    # Threads that wait for another disk do not count.
    used = ((thread, descriptor_in_use(thread)) for thread in names)
    blocked = {(thread, number) for thread, number in used if number in descriptors}
    # In two checks in a row: threads also wait for a disk that answers, but not for long.
    cycle = sorted(names[thread] for thread, _number in blocked & watched.blocked)
    watched.blocked = blocked
    if cycle:
        failed = watched.fail(watched.seconds)
        log(
            logging.ERROR,
            "%s: the process waits for its own disk: %s cannot continue, and handlers have not answered for %g s;"
            " failing %d of their requests",
            watched.path,
            ", ".join(cycle),
            watched.seconds,
            failed,
        )


def _report_threads(native: Native, watched: _Watched) -> bool:
    """Report threads that have been in a handler for too long, once each; return whether there are any."""
    frames = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    calls, late = set(), False
    for thread, call, seconds in native.busy():
        key = (thread, call)
        calls.add(key)
        late |= seconds >= watched.seconds
        if seconds >= watched.seconds and key not in watched.reported_threads and thread in frames:
            watched.reported_threads.add(key)
            stack = "".join(traceback.format_stack(frames[thread]))
            name = names.get(thread, str(thread))
            text = "%s: a handler has run for %.1f s on thread %s:\n%s"
            log(logging.WARNING, text, watched.path, seconds, name, stack)
    watched.reported_threads &= calls
    return late


def _report_tasks(watched: _Watched) -> bool:
    """Report tasks that have had a request for too long, once each; return whether there are any."""
    numbers, late = set(), False
    for number, seconds, stack in watched.tasks():
        numbers.add(number)
        late |= seconds >= watched.seconds
        if seconds >= watched.seconds and number not in watched.reported_tasks:
            watched.reported_tasks.add(number)
            log(logging.WARNING, "%s: a task has had a request for %.1f s:\n%s", watched.path, seconds, stack)
    watched.reported_tasks &= numbers
    return late
