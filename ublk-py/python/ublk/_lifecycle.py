# SPDX-License-Identifier: MIT OR Apache-2.0

"""The end of the program, and forked children: what happens then, and in which order.

All exit handlers and fork hooks of the package are registered here. Exit handlers run from the last registered to the
first:

1. `stop_all` stops the devices that are still running.
2. With isolated devices, their module ends the processes that are left (`register_isolated`).
3. An exit handler of `multiprocessing`, if it was imported after this module, joins processes.
4. `_ublk.close_gate` keeps the threads that serve requests out of the interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

from ublk import _file_sync, _interval, _log, _signals, _threads, _ublk, _watchdog
from ublk._log import end_soon, in_time, log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ublk._device import Device

STOP_SECONDS = 30.0
"""How long a stop waits for handlers."""

_JOIN_SECONDS = 5.0
# For threads that are in the interpreter when it is about to be finalized.
_LEAVE_SECONDS = 5.0
# Limit for the last output of a program with a stuck handler: three writes of a second each, unless they block.
_EXIT_SECONDS = 10.0
# How often `stop_all` is repeated after an exception of a signal handler.
_ATTEMPTS = 100

# Devices that are to be stopped when the program ends.
running: set[Device] = set()
# Reentrant: signal handlers and finalizers, which may start and stop devices, may run while it is held.
_lock = threading.RLock()
# Starts in progress, whose devices may not be in `running` yet. None begins once the program ends.
_starting: set[object] = set()
_exiting = False


def add(device: Device) -> None:
    """Have a device stopped when the program ends."""
    with _lock:
        running.add(device)


def discard(device: Device) -> None:
    """Forget a device that is not running any more."""
    with _lock:
        running.discard(device)


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Make the end of the program wait for the start in this block. Raises `RuntimeError` if it has begun."""
    start = object()
    try:
        with _lock:
            if _exiting:
                raise RuntimeError("the interpreter is shutting down")
            _starting.add(start)
        yield
    finally:
        with _lock:
            _starting.discard(start)


def stop_all() -> None:
    """Stop all devices when the interpreter exits, whatever loggers and signal handlers raise."""
    for _ in range(_ATTEMPTS):
        try:
            again = any(device._hurried for device in list(running))
            with _signals.hurrying(_expedite_all, again=again):
                _stop_running()
            return
        except BaseException:
            # Raised by a signal handler, at any place: again, with the devices that are left.
            continue


def _expedite_all() -> None:
    """End all waits for handlers."""
    for device in list(running):
        device._native.expedite()


def _stop_running() -> None:
    global _exiting
    end_soon()
    deadline = time.monotonic() + STOP_SECONDS
    hang = False
    with _lock:
        _exiting = True
    # Starts by other threads, whose devices are to be stopped, too.
    while _starting and time.monotonic() < deadline:
        time.sleep(0.01)
    for device in list(running):
        if not device._is_hung():
            # An isolated device whose start was interrupted has no node.
            name = getattr(device._native, "path", "a device that was being started")
            _try(log, logging.WARNING, "%s was still running when the program ended", name)
            try:
                device._stop(max(0.0, deadline - time.monotonic()))
            except Exception as error:
                _try(log, logging.ERROR, "stopping %s: %s", name, error)
        hang = hang or device._is_hung()
    if hang:
        # Finalization would free what a thread that is still in a handler uses. The removal comes before anything is
        # written, which a signal may end.
        exit_stuck(leave_removal(list(running)))
    deadline = time.monotonic() + _JOIN_SECONDS
    for thread in _threads.running():
        thread.join(max(0.0, deadline - time.monotonic()))
    if not _log.wait_for_late(deadline - time.monotonic()):
        # It has locks that `logging.shutdown` and finalization would wait for.
        exit_stuck()


def exit_stuck(removal: str = "") -> NoReturn:
    """End the process although a handler is stuck. Also called when the gate is closed.

    The program's output is written if that takes no longer than a second.
    """
    # What the program has replaced, and functions that do not give the interpreter up, may block this thread for ever.
    _ublk.exit_within(_EXIT_SECONDS)
    end_soon()
    _try(log, logging.CRITICAL, "a handler is stuck; exiting immediately%s", removal)
    for name in ("stderr", "stdout"):
        _try(functools.partial(in_time, to=name), functools.partial(_try, _flush, name))
    os._exit(1)


def _try(function: Callable[..., object], *arguments: object) -> None:
    """Call something of the program's that must not keep devices from being stopped."""
    with contextlib.suppress(BaseException):
        function(*arguments)


def _flush(name: str) -> None:
    """Flush one of the standard files. A program that was started without it has None instead."""
    getattr(sys, name).flush()


# Run with this package's directory, the ID of the serving process, and the numbers of its devices.
_REMOVER = """
import sys
sys.stdin.read()
sys.path.append(sys.argv[1])
from ublk import _ublk
from ublk._log import print_error
for id in map(int, sys.argv[3:]):
    try:
        if _ublk.device(id)["pid"] in (None, int(sys.argv[2])):
            _ublk.delete(id, True)
    except OSError as error:
        print_error(f"ublk: removing /dev/ublkb{id}: {error}; `ublk del --dead` tries again")
"""


# Devices that such a process will remove.
_left: set[Device] = set()


def leave_removal(devices: Iterable[Device], *, recoverable: bool = False) -> str:
    """Start a process that removes devices of this process once it has ended; return a text for the log about that.

    Recoverable devices are left to another server, unless ``recoverable``. Calling it again for a device only returns
    the text.
    """
    removed: list[Device] = []
    kept: list[int] = []
    for device in devices:
        native = device._native
        if not native.on_kernel or native.stopped:
            continue
        if recoverable or native.recovery is None:
            removed.append(device)
        else:
            kept.append(native.id)
    text = "".join(f"; /dev/ublkb{id} waits for another server: ublk.recover({id}, ...)" for id in kept)
    if not removed:
        return text
    new = [device for device in removed if device not in _left]
    if not new:
        return f"{text}; its devices are removed after that"
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # Isolated mode (-I), so that neither the working directory nor the environment adds code.
    ids = [str(device._native.id) for device in new]
    command = [sys.executable, "-I", "-c", _REMOVER, package, str(os.getpid()), *ids]
    try:
        # It begins when the pipe closes, with this process. Signals to this process's group must not end it.
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd="/", start_new_session=True)
        _left.update(new)
    except Exception as error:
        return f"{text}; `ublk del --dead` removes its devices ({error})"
    return f"{text}; its devices are removed after that"


def _in_forked_child() -> None:
    """Forget the parent's devices, and the lock that one of its threads may have held."""
    global _lock
    _ublk.after_fork()
    _lock = threading.RLock()
    _starting.clear()
    running.clear()
    _left.clear()


atexit.register(_ublk.close_gate, _LEAVE_SECONDS)
atexit.register(stop_all)


def register_fork_hook(hook: Callable[[], None]) -> None:
    """Run a function in forked children, again if a signal handler interrupts it by an exception."""
    os.register_at_fork(after_in_child=functools.partial(_ublk.run_fork_hook, hook))


# One hook each, so that an exception of one does not skip the others.
for _hook in (
    _signals.in_forked_child,
    _log.in_forked_child,
    _threads.in_forked_child,
    _interval.in_forked_child,
    _watchdog.in_forked_child,
    _in_forked_child,
    _file_sync.in_forked_child,
):
    register_fork_hook(_hook)


def register_isolated(end: Callable[[], None], in_forked_child: Callable[[], None]) -> None:
    """Run ``end`` at exit after `stop_all`, and a hook in forked children, for the module of isolated devices.

    That module is imported with the first isolated device. The exit handler of `multiprocessing` waits for processes,
    and must run after ``end``.
    """
    import multiprocessing.util  # noqa: F401 (registers its exit handler)

    register_fork_hook(in_forked_child)
    atexit.register(end)
    atexit.unregister(stop_all)
    atexit.register(stop_all)


_ends_with_worker = -1


def end_with_worker(end: Callable[[], None]) -> None:
    """Run ``end`` also in worker processes of `multiprocessing`, which run no exit handlers."""
    global _ends_with_worker
    from multiprocessing.util import Finalize

    if _ends_with_worker != os.getpid():
        _ends_with_worker = os.getpid()
        Finalize(None, end, exitpriority=10)
