# SPDX-License-Identifier: MIT OR Apache-2.0
"""Handlers that meddle with threads, processes and signals."""

import contextlib
import ctypes
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable

from .case import EITHER, ENDS, ERROR, LIVES, MAY_END, PLAIN, RIGHT, WORKERS, case, define, right


@case(EITHER, MAY_END)
def exits_its_thread(*_):
    import _thread

    _thread.exit()


@case(ERROR, ENDS)
def exits_at_once(*_):
    os._exit(3)


@case(ERROR, ENDS)
def aborts(*_):
    os.abort()


@case(ERROR, ENDS)
def reads_address_zero(*_):
    ctypes.string_at(0)


for _signal in (
    "SIGKILL",
    "SIGTERM",
    "SIGINT",
    "SIGHUP",
    "SIGBUS",
    "SIGPIPE",
    "SIGUSR1",
    "SIGALRM",
    "SIGCHLD",
    "SIGXFSZ",
):
    # Those that the interpreter ignores, or which do nothing, leave the handler to answer.
    _harmless = _signal in ("SIGPIPE", "SIGCHLD", "SIGXFSZ")

    def _raise(disk, op, offset, buf, name=_signal):
        os.kill(os.getpid(), signal.Signals[name])
        time.sleep(0.5)
        right(disk, op, offset, buf)

    define(f"sends_itself_{_signal}", _raise, RIGHT if _harmless else EITHER, LIVES if _harmless else MAY_END)


@case(RIGHT)
def forks_a_child_that_exits(disk, op, offset, buf):
    _forked(lambda: None)
    right(disk, op, offset, buf)


@case(RIGHT)
def forks_a_child_that_stays(disk, op, offset, buf):
    _forked(lambda: time.sleep(3))
    right(disk, op, offset, buf)


@case(RIGHT)
def forks_a_child_that_scribbles(disk, op, offset, buf):
    def scribble():
        if not buf.readonly:
            buf[:] = bytes(len(buf))

    _forked(scribble)
    right(disk, op, offset, buf)


@case(EITHER, MAY_END, styles=(PLAIN, WORKERS))
def forks_and_returns_in_both(disk, op, offset, buf):
    right(disk, op, offset, buf)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid == 0:
        # The child must not live on when the test is over.
        signal.alarm(5)


def _forked(act: Callable[[], None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            act()
        os._exit(0)


@case(ERROR, ENDS)
def executes_another_program(*_):
    os.execv("/bin/true", ["true"])


@case(RIGHT)
def starts_fifty_threads(disk, op, offset, buf):
    for _ in range(50):
        threading.Thread(target=time.sleep, args=[1], daemon=True).start()
    right(disk, op, offset, buf)


@case(EITHER, MAY_END)
def leaves_a_thread_that_is_no_daemon(disk, op, offset, buf):
    threading.Thread(target=time.sleep, args=[2]).start()
    right(disk, op, offset, buf)


@case(EITHER, MAY_END)
def interrupts_the_main_thread(disk, op, offset, buf):
    import _thread

    _thread.interrupt_main()
    right(disk, op, offset, buf)


@case(EITHER, MAY_END, needs_kernel=True)
def raises_in_every_other_thread(disk, op, offset, buf):
    for thread in threading.enumerate():
        if thread.ident != threading.get_ident():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(ValueError))
    right(disk, op, offset, buf)
