# SPDX-License-Identifier: MIT OR Apache-2.0
"""Handlers that meddle with the interpreter."""

import contextlib
import gc
import logging
import sys
import threading
import warnings

from .case import EITHER, ERROR, MAY_END, RIGHT, case, right


@case(RIGHT, needs_kernel=True)
def installs_a_trace_function_that_raises(disk, op, offset, buf):
    right(disk, op, offset, buf)

    def trace(*_):
        raise ValueError("trace")

    threading.settrace(trace)


@case(EITHER)
def lets_profiling_raise(disk, op, offset, buf):
    def profile(*_):
        sys.setprofile(None)
        raise ValueError("profile")

    right(disk, op, offset, buf)
    sys.setprofile(profile)


class _RaisesInDel:
    def __del__(self) -> None:
        raise ValueError("del")


@case(RIGHT)
def leaves_a_destructor_that_raises(disk, op, offset, buf):
    cycle: list = [_RaisesInDel()]
    cycle.append(cycle)
    right(disk, op, offset, buf)
    del cycle
    gc.collect()


class _RaisesInEmit(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise SystemError("emit")


@case(ERROR, MAY_END)
def has_a_log_handler_that_raises(*_):
    logging.getLogger("ublk").addHandler(_RaisesInEmit())
    raise ValueError("planted")


class _StopsInEmit(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise SystemExit(3)


@case(ERROR, MAY_END)
def has_a_log_handler_that_exits(*_):
    logging.getLogger("ublk").addHandler(_StopsInEmit())
    raise ValueError("planted")


@case(ERROR)
def has_an_excepthook_that_raises(*_):
    def hook(*_):
        raise ValueError("hook")

    sys.excepthook = threading.excepthook = sys.unraisablehook = hook
    raise ValueError("planted")


@case(EITHER)
def deletes_its_methods(disk, op, offset, buf):
    right(disk, op, offset, buf)
    type(disk).read = None


@case(EITHER)
def becomes_another_class(disk, op, offset, buf):
    right(disk, op, offset, buf)
    with contextlib.suppress(TypeError):
        disk.__class__ = object


@case(RIGHT)
def clears_its_attributes(disk, op, offset, buf):
    right(disk, op, offset, buf)
    disk.size = disk.block_size = None


@case(EITHER, MAY_END)
def imports_what_does_not_exist(*_):
    import no_such_module_anywhere  # noqa: F401


@case(RIGHT)
def turns_warnings_into_errors(disk, op, offset, buf):
    warnings.simplefilter("error")
    right(disk, op, offset, buf)


@case(RIGHT)
def collects_garbage(disk, op, offset, buf):
    gc.collect()
    right(disk, op, offset, buf)


@case(RIGHT)
def switches_threads_all_the_time(disk, op, offset, buf):
    sys.setswitchinterval(1e-6)
    right(disk, op, offset, buf)
