# SPDX-License-Identifier: MIT OR Apache-2.0
"""The catalogue: ways in which a Python handler goes wrong, each with what its client may see.

A case is a function of the disk, the operation, the offset and the buffer, called in place of the right handler for
one block of the disk. What it returns is what the handler returns.
"""

import asyncio
import builtins
import contextlib
import ctypes
import errno
import gc
import json
import logging
import os
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ublk

# What the client of the request may get: an errno, the right answer, or one of both.
ERROR, RIGHT, EITHER = "error", "right", "either"
# What becomes of the server: it goes on serving, it ends, or either.
LIVES, ENDS, MAY_END = "lives", "ends", "may end"

PLAIN, WORKERS, TASKS, HANDLE, PULL = STYLES = ("plain", "workers", "tasks", "handle", "pull")
# Styles with methods, whose result counts.
METHODS = (PLAIN, WORKERS, TASKS)


@dataclass(frozen=True)
class Case:
    """One way to go wrong."""

    name: str
    act: Callable[..., Any]
    client: str = ERROR
    server: str = LIVES
    styles: tuple[str, ...] = STYLES
    operations: tuple[str, ...] = ("read", "write")
    # It harms the stand-in driver's client as well, which is a thread of the server.
    needs_kernel: bool = False
    # The request does not end by itself: what counts is that the server can be ended.
    blocks: bool = False


CASES: dict[str, Case] = {}


def case(client: str = ERROR, server: str = LIVES, **more: Any) -> Callable[[Callable], Callable]:
    """Adds a function to the catalogue."""

    def add(act: Callable) -> Callable:
        name = act.__name__
        assert name not in CASES, name
        CASES[name] = Case(name, act, client, server, **more)
        return act

    return add


def define(name: str, act: Callable, client: str = ERROR, server: str = LIVES, **more: Any) -> None:
    CASES[name] = Case(name, act, client, server, **more)


# -- Exceptions: each built-in class, and errors with numbers that are none.

_ARGUMENTS = {
    "UnicodeDecodeError": ("utf-8", b"x", 0, 1, "planted"),
    "UnicodeEncodeError": ("utf-8", "x", 0, 1, "planted"),
    "UnicodeTranslateError": ("x", 0, 1, "planted"),
    "BaseExceptionGroup": ("planted", [KeyboardInterrupt()]),
    "ExceptionGroup": ("planted", [ValueError()]),
}
_STOPS = ("SystemExit", "KeyboardInterrupt")


def raiser(make: Callable[[], BaseException]) -> Callable:
    def act(*_: Any) -> None:
        raise make()

    return act


for _name, _class in sorted(vars(builtins).items()):
    if isinstance(_class, type) and issubclass(_class, BaseException) and _class.__name__ == _name:
        _arguments = _ARGUMENTS.get(_name, ("planted",))
        define(
            f"raises_{_name}",
            raiser(lambda kind=_class, arguments=_arguments: kind(*arguments)),
            server=ENDS if _name in _STOPS else MAY_END if not issubclass(_class, Exception) else LIVES,
        )

for _number in (0, -5, 41, 58, 134, 511, 512, 523, 524, 530, 600, 4095, 4096, 1 << 31, 1 << 40, None, "text", 1.5):
    define(f"raises_OSError_{_number}", raiser(lambda number=_number: OSError(number, "planted")))


class _Nasty(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")

    __repr__ = __str__


class _NastyAttributes(OSError):
    @property
    def errno(self) -> int:
        raise ValueError("no number")


@case()
def raises_what_has_no_text(*_):
    raise _Nasty


@case()
def raises_what_has_no_errno(*_):
    raise _NastyAttributes(5, "planted")


@case()
def raises_a_chain_that_is_a_circle(*_):
    first, second = ValueError("first"), ValueError("second")
    first.__context__, second.__context__ = second, first
    raise first


@case()
def raises_an_exception_with_a_megabyte_of_text(*_):
    raise ValueError("x" * (1 << 20))


@case()
def raises_the_class_of_an_error_instead_of_one(*_):
    raise OSError


@case()
def raises_in_a_finally(*_):
    try:
        raise ValueError("first")
    finally:
        raise OSError(errno.ENOSPC, "second")


@case()
def raises_what_is_no_exception(*_):
    raise 5  # type: ignore[misc]  # noqa: B016


@case()
def recurses_without_end(disk, *rest):
    recurses_without_end(disk, *rest)


@case()
def recurses_in_c(*_):
    value: list = []
    for _ in range(100_000):
        value = [value]
    json.dumps(value)


# -- Results.


class _Index:
    def __index__(self) -> int:
        raise ValueError("no index")


for _name, _make in {
    "one_byte_less": lambda buf: len(buf) - 1,
    "one_byte_more": lambda buf: len(buf) + 1,
    "zero": lambda _: 0,
    "minus_one": lambda _: -1,
    "a_huge_number": lambda _: 1 << 80,
    "a_negative_huge_number": lambda _: -(1 << 80),
    "a_float": lambda buf: float(len(buf)),
    "a_text": lambda _: "4096",
    "bytes": lambda buf: bytes(len(buf)),
    "the_buffer": lambda buf: buf,
    "a_list": lambda _: [],
    "true": lambda _: True,
    "false": lambda _: False,
    "NotImplemented": lambda _: NotImplemented,
    "an_exception": lambda _: OSError(5, "not raised"),
    "what_has_no_index": lambda _: _Index(),
    "a_function": lambda _: lambda: None,
    "a_generator": lambda _: (x for x in ()),
    "an_extent_of_nothing": lambda buf: ublk.Extent(2, 0, len(buf)),
    "an_extent_that_is_too_short": lambda _: ublk.Extent(2, 0, 512),
    "an_extent_of_a_directory": lambda buf: ublk.Extent(os.open("/", os.O_RDONLY), 0, len(buf)),
    "an_extent_of_a_pipe": lambda buf: ublk.Extent(os.pipe()[0], 0, len(buf)),
    "an_extent_of_a_closed_file": lambda buf: _extent_of_closed(len(buf)),
    "an_extent_past_the_end": lambda buf: ublk.Extent(_devnull(), 1 << 40, len(buf)),
    "zeros_that_are_too_short": lambda _: ublk.Zeros(512),
}.items():
    define(f"returns_{_name}", lambda _disk, _op, _offset, buf, make=_make: make(buf), ERROR, styles=METHODS)


def _devnull() -> int:
    return os.open("/proc/version", os.O_RDONLY)


def _extent_of_closed(length: int) -> ublk.Extent:
    file = os.open("/proc/version", os.O_RDONLY)
    os.close(file)
    return ublk.Extent(file, 0, length)


@case(styles=(PLAIN, WORKERS))
def returns_a_coroutine_nobody_awaits(*_):
    async def never():
        pass

    return never()


@case(styles=(TASKS,))
def returns_a_coroutine_that_returns_one(*_):
    async def inner():
        pass

    async def outer():
        return inner()

    return outer()


# -- Buffers.


def right(disk, op, offset, buf) -> None:
    disk.right(op, offset, buf)


@case(RIGHT)
def keeps_the_view(disk, op, offset, buf):
    right(disk, op, offset, buf)
    disk.kept.append(buf)


@case(RIGHT)
def keeps_a_slice_and_scribbles_later(disk, op, offset, buf):
    right(disk, op, offset, buf)
    part = buf[:512]

    def scribble():
        time.sleep(0.2)
        with contextlib.suppress(ValueError, TypeError):
            part[:] = b"\xee" * 512

    threading.Thread(target=scribble, daemon=True).start()


@case(RIGHT)
def keeps_a_ctypes_array(disk, op, offset, buf):
    right(disk, op, offset, buf)
    if not buf.readonly:
        disk.kept.append((ctypes.c_char * len(buf)).from_buffer(buf))


@case(RIGHT)
def keeps_a_cast(disk, op, offset, buf):
    right(disk, op, offset, buf)
    disk.kept.append(buf.cast("Q"))


@case(RIGHT)
def keeps_itself_in_a_cycle(disk, op, offset, buf):
    right(disk, op, offset, buf)
    cycle: list = [buf, buf[:8]]
    cycle.append(cycle)


@case(EITHER)
def releases_the_view(disk, op, offset, buf):
    right(disk, op, offset, buf)
    buf.release()


@case(operations=("write",))
def writes_to_a_buffer_that_is_to_be_read(_disk, _op, _offset, buf):
    buf[0] = 1


@case()
def assigns_the_wrong_length(_disk, _op, _offset, buf):
    buf[:] = bytes(len(buf) - 1)


@case()
def indexes_past_the_end(_disk, _op, _offset, buf):
    return buf[len(buf)]


@case(EITHER, operations=("read",))
def fills_nothing(*_):
    return None


@case(EITHER, operations=("read",))
def fills_half(disk, _op, offset, buf):
    disk.right("read", offset, buf[: len(buf) // 2])


@case(RIGHT)
def passes_the_view_to_a_thread_that_reads_late(disk, op, offset, buf):
    right(disk, op, offset, buf)

    def look():
        time.sleep(0.2)
        with contextlib.suppress(ValueError):
            bytes(buf)

    threading.Thread(target=look, daemon=True).start()


@case(RIGHT)
def releases_in_a_thread_meanwhile(disk, op, offset, buf):
    right(disk, op, offset, buf)
    part = buf[8:]
    threading.Thread(target=part.release, daemon=True).start()


# -- Time.


@case(RIGHT)
def takes_three_seconds(disk, op, offset, buf):
    time.sleep(3)
    right(disk, op, offset, buf)


@case(EITHER, MAY_END, blocks=True)
def sleeps_for_ever(*_):
    time.sleep(1e6)


@case(EITHER, MAY_END, blocks=True)
def computes_for_ever(*_):
    while True:
        pass


@case(EITHER, MAY_END, blocks=True)
def waits_for_a_lock_it_has(*_):
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


@case(EITHER, MAY_END, blocks=True)
def reads_a_pipe_nobody_writes(*_):
    os.read(os.pipe()[0], 1)


@case(EITHER, MAY_END, blocks=True)
def waits_for_an_event(*_):
    threading.Event().wait()


@case(EITHER, MAY_END, blocks=True)
def sleeps_and_swallows_everything(*_):
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(1e6)


@case(EITHER, MAY_END, styles=(TASKS,), blocks=True)
def awaits_for_ever(*_):
    return asyncio.Event().wait()


@case(EITHER, MAY_END, styles=(TASKS,), blocks=True)
def swallows_cancellation(*_):
    async def body():
        while True:
            with contextlib.suppress(BaseException):
                await asyncio.sleep(1e6)

    return body()


# -- Threads, processes and signals.


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


# -- What the process has.


@case(EITHER, MAY_END, needs_kernel=True)
def closes_all_descriptors(disk, op, offset, buf):
    os.closerange(3, 4096)
    right(disk, op, offset, buf)


@case(RIGHT)
def closes_its_standard_streams(disk, op, offset, buf):
    null = os.open("/dev/null", os.O_RDWR)
    for number in (1, 2):
        os.dup2(null, number)
    sys.stdout = sys.stderr = None  # type: ignore[assignment]
    right(disk, op, offset, buf)


@case()
def uses_a_closed_descriptor(*_):
    read, write = os.pipe()
    os.close(read)
    os.close(write)
    os.read(read, 1)


@case(RIGHT, needs_kernel=True)
def uses_up_all_descriptors(disk, op, offset, buf):
    with contextlib.suppress(OSError):
        while True:
            disk.kept.append(os.open("/dev/null", os.O_RDONLY))
    right(disk, op, offset, buf)


@case()
def allocates_too_much(*_):
    bytearray(1 << 50)


@case(EITHER, MAY_END, needs_kernel=True)
def has_no_memory_left(disk, op, offset, buf):
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 20, before[1]))
    try:
        bytearray(16 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@case(RIGHT, needs_kernel=True)
def keeps_a_limit_of_memory(disk, op, offset, buf):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), resource.RLIM_INFINITY))
    right(disk, op, offset, buf)


@case(RIGHT)
def leaves_its_directory(disk, op, offset, buf):
    os.chdir("/proc")
    right(disk, op, offset, buf)


@case(RIGHT)
def becomes_somebody_else(disk, op, offset, buf):
    # The thread's alone; the C library would do so for all of them.
    ctypes.CDLL(None).syscall(105, 65534)
    right(disk, op, offset, buf)


@case(RIGHT)
def blocks_all_signals(disk, op, offset, buf):
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))
    right(disk, op, offset, buf)


# -- The interpreter.


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


# -- The device.


@case(EITHER, MAY_END)
def stops_its_own_device(disk, op, offset, buf):
    disk.device.stop()
    right(disk, op, offset, buf)


@case(EITHER, MAY_END)
def stops_its_device_in_a_thread(disk, op, offset, buf):
    thread = threading.Thread(target=disk.device.stop, daemon=True)
    thread.start()
    time.sleep(0.5)
    right(disk, op, offset, buf)


@case(RIGHT)
def asks_for_its_statistics(disk, op, offset, buf):
    disk.device.stats()
    right(disk, op, offset, buf)


@case(EITHER)
def invalidates_and_waits(disk, op, offset, buf):
    disk.invalidate(wait=True)
    right(disk, op, offset, buf)


@case(EITHER)
def starts_itself_again(disk, op, offset, buf):
    with contextlib.suppress(Exception):
        disk.start()
    right(disk, op, offset, buf)


@case(EITHER, MAY_END, needs_kernel=True)
def closes_its_char_device(disk, op, offset, buf):
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if "ublkc" in os.readlink(f"/proc/self/fd/{name}"):
                os.close(int(name))
    right(disk, op, offset, buf)


# -- Event loops.


@case(EITHER, MAY_END, styles=(TASKS,))
def stops_its_loop(disk, op, offset, buf):
    asyncio.get_running_loop().stop()
    right(disk, op, offset, buf)


@case(ERROR, styles=(TASKS,))
def closes_its_loop(*_):
    asyncio.get_running_loop().close()


@case(ERROR, styles=(TASKS,))
def cancels_itself(*_):
    async def body():
        asyncio.current_task().cancel()
        await asyncio.sleep(0)

    return body()


@case(EITHER, MAY_END, styles=(TASKS,))
def cancels_all_tasks(disk, op, offset, buf):
    async def body():
        for task in asyncio.all_tasks():
            task.cancel()
        await asyncio.sleep(0)
        right(disk, op, offset, buf)

    return body()


@case(ERROR, styles=(TASKS,))
def raises_CancelledError(*_):
    raise asyncio.CancelledError


@case(ERROR, styles=(TASKS,))
def runs_a_loop_inside(*_):
    async def nothing():
        pass

    coroutine = nothing()
    try:
        asyncio.run(coroutine)
    finally:
        coroutine.close()


@case(ERROR, styles=(TASKS,))
def awaits_what_cannot_be_awaited(*_):
    async def body():
        await 5

    return body()


@case(ERROR, styles=(TASKS,))
def times_out(*_):
    async def body():
        async with asyncio.timeout(0.01):
            await asyncio.sleep(10)

    return body()


@case(ERROR, styles=(TASKS,))
def yields_without_a_future(*_):
    class Bare:
        def __await__(self):
            yield 5

    async def body():
        await Bare()

    return body()


# -- Requests as objects; the buffer is the request.

OBJECTS = (HANDLE, PULL)


def on_request(client: str = ERROR, server: str = LIVES, **more: Any) -> Callable[[Callable], Callable]:
    return case(client, server, styles=OBJECTS, **more)


@on_request(RIGHT)
def completes_twice(disk, op, offset, request):
    right(disk, op, offset, request.buffer)
    request.complete()
    with contextlib.suppress(Exception):
        request.complete()


@on_request(RIGHT)
def fails_after_completion(disk, op, offset, request):
    right(disk, op, offset, request.buffer)
    request.complete()
    with contextlib.suppress(Exception):
        request.fail(5)


@on_request(EITHER)
def drops_the_request(_disk, _op, _offset, request):
    del request


@on_request(RIGHT)
def completes_in_a_thread_later(disk, op, offset, request):
    def later():
        time.sleep(0.3)
        disk.right(op, offset, request.buffer)
        request.complete()

    threading.Thread(target=later, daemon=True).start()


@on_request(EITHER)
def completes_in_a_destructor(disk, op, offset, request):
    class Late:
        def __del__(self):
            disk.right(op, offset, request.buffer)
            request.complete()

    Late()


@on_request(RIGHT)
def scribbles_after_completion(disk, op, offset, request):
    buffer = request.buffer
    right(disk, op, offset, buffer)
    request.complete()
    with contextlib.suppress(Exception):
        buffer[:] = b"\xee" * len(buffer)


for _number in (0, -5, 41, 134, 524, 600, 4095, 4096, 1 << 40):

    def _fail(_disk, _op, _offset, request, number=_number):
        try:
            request.fail(number)
        except Exception:
            request.fail(errno.EIO)

    define(f"fails_with_{_number}", _fail, styles=OBJECTS)


@on_request()
def fails_with_nothing(_disk, _op, _offset, request):
    try:
        request.fail(None)
    except Exception:
        request.fail(errno.EIO)


@on_request(EITHER, MAY_END, blocks=True)
def keeps_the_request_for_ever(disk, _op, _offset, request):
    disk.kept.append(request)


# -- Planted faults of the server, for the test of the judge: not part of a campaign.


def answers_with_wrong_bytes(_disk, _op, _offset, buf):
    if not buf.readonly:
        buf[:] = b"\x77" * len(buf)


def answers_with_bytes_of_another_block(disk, _op, offset, buf):
    if not buf.readonly:
        disk.right("read", offset - len(buf), buf)


PLANTED = {
    "wrong-bytes": Case(
        "answers_with_wrong_bytes", answers_with_wrong_bytes, RIGHT, styles=(PLAIN,), operations=("read",)
    ),
    "other-block": Case(
        "answers_with_bytes_of_another_block",
        answers_with_bytes_of_another_block,
        EITHER,
        styles=(PLAIN,),
        operations=("read",),
    ),
    "acknowledged-failure": Case("returns_nothing", lambda *_: None, ERROR, styles=(PLAIN,), operations=("write",)),
    "dies": Case("exits_at_once", lambda *_: os._exit(3), EITHER, LIVES, styles=(PLAIN,), operations=("read",)),
}


def all_of(style: str) -> list[Case]:
    return [found for found in CASES.values() if style in found.styles]
