# SPDX-License-Identifier: MIT OR Apache-2.0

"""Signals that would kill the program before it can remove its devices."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from ublk import _ublk

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator
    from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)

# Reentrant: signal handlers and finalizers may run while it is held.
_lock = threading.RLock()
_devices: set[object] = set()
# Whether the main thread has started one of them.
_handling = False
# Signals that were handled since then. The program may have set other handlers meanwhile.
_replaced: set[int] = set()

# How long after the first signal another one is a second wish, as for the `ublk` command.
AGAIN_SECONDS = 0.5
# When a signal first raised `Terminated`, while the present devices run.
_first: float | None = None


class Terminated(SystemExit):
    """Raised in the main thread by SIGTERM or SIGHUP while devices run; exits with 128 + the signal."""


def _is_second(number: int, first: float) -> bool:
    """Whether a signal is a second wish to end, after one at the time ``first``.

    One that follows at once is the first one again: a process may get it for itself and as one of its group. So is a
    SIGHUP, which comes with the SIGTERM of service managers, and from terminals that are closed.
    """
    return number != signal.SIGHUP and time.monotonic() - first >= AGAIN_SECONDS


def _terminate(number: int, _frame: FrameType | None) -> None:
    global _first
    if not _devices:
        # Another thread has stopped the last device, and this one has not restored the signals yet.
        _put_back()
        if signal.getsignal(number) is _terminate:
            # The program has saved this handler, and set it again later.
            signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
        return
    if _first is None:
        _first = time.monotonic()
    elif not _is_second(number, _first):
        return
    raise Terminated(128 + number)


# The pipe that signals write to while threads wait, the number of waits, and the descriptor that it replaces.
_pipe: tuple[int, int] | None = None
_waiting = 0
_before = -1


@contextlib.contextmanager
def wakeup_fd() -> Iterator[int | None]:
    """Yield a descriptor that becomes readable with each signal, in the main thread; None in other threads.

    The kernel may deliver a signal to any thread, and interrupts only that one.
    """
    global _pipe, _waiting, _before
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    with _lock:
        # Never closed: waits end in any order, and some on any thread, when generators are collected.
        pipe = _pipe = _pipe or os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # Set for each wait: an event loop may have set its own descriptor and removed it meanwhile.
        before = signal.set_wakeup_fd(pipe[1], warn_on_full_buffer=False)
        if before != pipe[1]:
            _before = before
        _waiting += 1
    try:
        yield pipe[0]
    finally:
        with _lock:
            # In a forked child, the pipe of the parent is replaced.
            ours = pipe == _pipe
            _waiting -= ours
            if ours and _waiting == 0 and threading.current_thread() is threading.main_thread():
                present = signal.set_wakeup_fd(_before)
                if present != pipe[1]:
                    # The program has set its own descriptor meanwhile.
                    signal.set_wakeup_fd(present)


def drain(descriptor: int) -> None:
    """Empty the descriptor of `wakeup_fd`; the signal handlers have run by then."""
    with contextlib.suppress(BlockingIOError):
        while os.read(descriptor, 64):
            pass


def _give_back() -> bool:
    """Restore the program's own wake-up descriptor, if it had one; return whether it had."""
    with _lock:
        if _before == -1:
            return False
        signal.set_wakeup_fd(_before)
        if _pipe is not None:
            # Signals that have arrived meanwhile.
            with contextlib.suppress(OSError):
                os.write(_before, os.read(_pipe[0], 64))
        return True


@contextlib.contextmanager
def waking(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Make signals wake the event loop of this thread, so that their handlers run without delay.

    If the program has a wake-up descriptor, it is the loop's own and does the same: nothing is changed then.
    """
    with wakeup_fd() as signalled:
        if signalled is None or _give_back():
            yield
            return
        # A loop has one reader for each descriptor.
        descriptor = os.dup(signalled)
        try:
            loop.add_reader(descriptor, drain, descriptor)
            yield
        finally:
            if not loop.is_closed():
                loop.remove_reader(descriptor)
            os.close(descriptor)


def device_started(device: object) -> None:
    """Handle the signals whose default action is to kill, if the main thread starts the device."""
    global _first, _handling
    with _lock:
        if not _devices:
            _first, _handling = None, False
            # An exception of a signal handler may have interrupted the end of the last device.
            _replaced.intersection_update([number for number in _SIGNALS if signal.getsignal(number) is _terminate])
        _devices.add(device)
        if threading.current_thread() is threading.main_thread():
            _handling = True
            _adjust()


def device_stopped(device: object) -> None:
    """Restore the signals after the last device: at once in the main thread, else when it runs Python code again."""
    with _lock:
        _devices.discard(device)
        if _devices or not _replaced:
            return
    if threading.current_thread() is threading.main_thread():
        _put_back()
        return
    # If the queue of calls is full, the first signal restores them.
    with contextlib.suppress(RuntimeError):
        _ublk.call_in_main_thread(_put_back)


def _put_back() -> None:
    """Restore the signal handlers from before the first device, unless one has started meanwhile."""
    with _lock:
        if not _devices:
            _adjust()


def _adjust() -> None:
    while True:
        handled = _handling and bool(_devices)
        for number in _SIGNALS:
            if handled:
                _handle(number)
            else:
                _restore(number)
        # A signal handler may have started or stopped a device meanwhile.
        if handled == (_handling and bool(_devices)):
            return


def _handle(number: int) -> None:
    if number not in _replaced and signal.getsignal(number) == signal.SIG_DFL:
        try:
            _replaced.add(number)
            signal.signal(number, _terminate)
        except BaseException:
            # A handler of another signal has raised, before or after the call had its effect.
            if signal.getsignal(number) is not _terminate:
                _replaced.discard(number)
            raise


def _restore(number: int) -> None:
    if signal.getsignal(number) is _terminate:
        signal.signal(number, signal.SIG_DFL)
    # Last: a device that a signal handler starts before this leaves the signal to `_adjust`.
    _replaced.discard(number)


def in_forked_child() -> None:
    """Forget the parent's devices and signals, and the lock that one of its threads may have held."""
    global _lock, _pipe, _waiting
    _lock = threading.RLock()
    _devices.clear()
    _waiting = 0
    _put_back()
    if _pipe is not None:
        # Signals of the child must not wake the parent.
        present = signal.set_wakeup_fd(-1)
        if present != _pipe[1]:
            signal.set_wakeup_fd(present)
        _pipe = None


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Defer SIGINT, SIGTERM and SIGHUP until the end of the block, in the main thread; not the second one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    first = 0.0
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, *_SIGNALS)}
    # Ignored signals stay ignored, since child processes inherit that.
    before = {number: handler for number, handler in found.items() if handler != signal.SIG_IGN}

    def put_back() -> None:
        try:
            for wanted, handler in before.items():
                signal.signal(wanted, signal.SIG_DFL if handler is None else handler)
        except BaseException:
            # From the handler of a signal: the rest, and those again.
            put_back()
            raise

    def take(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        if not came:
            first = time.monotonic()
            came.append(number)
        elif _is_second(number, first):
            # The block takes too long.
            came.clear()
            put_back()
            signal.raise_signal(number)

    try:
        for wanted in before:
            signal.signal(wanted, take)
        yield
    finally:
        put_back()
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def hurrying(hurry: Callable[[], None], *, again: bool = False) -> Iterator[None]:
    """Make SIGINT, SIGTERM and SIGHUP call a function instead of their handlers, and exit at the second one.

    With ``again``, exit at the first one. For the main thread, while the program ends. Signals that are ignored or kill
    the process still do so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first = time.monotonic() if again else None

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        if _first is not None and not _is_second(number, _first):
            # It came with the one that has ended the program.
            return
        if first is None:
            first = time.monotonic()
        elif _is_second(number, first):
            os._exit(128 + number)
        hurry()

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, *_SIGNALS):
            handler = signal.getsignal(number)
            if callable(handler):
                before[number] = handler
                signal.signal(number, handle)
        yield
    finally:
        for replaced, handler in before.items():
            if signal.getsignal(replaced) is handle:
                signal.signal(replaced, handler)
