# SPDX-License-Identifier: MIT OR Apache-2.0

"""Running devices."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import errno
import functools
import logging
import math
import os
import select
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

from ublk import _interval, _signals, _ublk, _watchdog
from ublk._errors import UblkError
from ublk._log import Limiter, also, end_soon, in_time, log
from ublk._numbers import number
from ublk._requests import Requests
from ublk._running_loop import event_loop
from ublk._serving import LoopServing, PullServing, Serving
from ublk._stats import OpStats, Stats
from ublk._system import DeviceInfo
from ublk._threads import running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from _typeshed import FileDescriptorLike

    from ublk._block_device import BlockDevice
    from ublk._native import NativeDisk
    from ublk._serving import LoopFactory, Native

_JOIN_SECONDS = 5.0
# After which a handler that is still running is reported.
HANG_SECONDS = 30.0
# For how long a stop waits for handlers.
STOP_SECONDS = 30.0
# The same, for one that cancels.
_CANCEL_SECONDS = 1.0
# The kernel counts milliseconds in 31 bits.
_LONGEST_POLL = 1_000_000.0
# As long as any.
_FOREVER = float(1 << 31)
# For threads that are in the interpreter when it is about to be finalized.
_LEAVE_SECONDS = 5.0
# Signals' handlers may keep the stopping of devices from its work so often.
_ATTEMPTS = 100
_running: set[Device] = set()
_running_lock = threading.Lock()
# Starts under way, whose devices may not be in `_running` yet; none begins once the program ends.
_starting = 0
_exiting = False


class Device:
    """Running block device; returned by `BlockDevice.start`.

    A context manager: leaving the block, also by an exception, stops and deletes the device. All methods may be called
    from any thread.
    """

    def __init__(self) -> None:
        raise TypeError("use BlockDevice.start() to create a Device")

    _native: Native
    _target: BlockDevice | NativeDisk
    _description: dict[str, Any]
    _options: dict[str, Any]
    _serving: Serving
    _exception: BaseException | None
    _stopped: bool
    _hangs: bool
    # A wait for its end was interrupted.
    _hurried: bool
    _hang_after: float | None
    _owner: int
    _start_over: threading.Event
    _stopping: threading.Lock
    _failures: Limiter
    # Called when there is a device that is not live yet.
    _made: Callable[[], None]

    @classmethod
    def _make(
        cls,
        target: BlockDevice | NativeDisk,
        queues: int,
        depth: int,
        id: int | None,
        *,
        recoverable: bool | str = False,
        hang_after: float | None = HANG_SECONDS,
        workers: int | None = None,
        pull: bool = False,
        loop_factory: LoopFactory | None = None,
        isolated: bool = False,
        shared_memory: bool = False,
        coalesce_usecs: int = 0,
    ) -> Device:
        """Check everything; nothing is made yet."""
        self = object.__new__(cls)
        self._target = target
        self._exception = None
        self._stopped = False
        self._hangs = False
        self._hurried = False
        self._start_over = threading.Event()
        self._stopping = threading.Lock()
        self._failures = Limiter()
        self._made = _nothing
        self._owner = os.getpid()
        workers = None if workers is None else number("workers", workers, 16)
        if workers == 0:
            raise ValueError("workers = 0: must be at least 1")
        shape = target._describe()
        if hang_after is not None and not hang_after > 0:
            raise ValueError(f"hang_after = {hang_after}: must be more than 0 seconds, or None")
        # Never, which is for the watchdog not to be asked at all.
        hang_after = None if hang_after == math.inf else hang_after
        self._serving = target._serve(self._report, workers=workers, pull=pull, loop_factory=loop_factory)
        coalesce_usecs = number("coalesce_usecs", coalesce_usecs, 32)
        if isolated:
            if shared_memory:
                raise ValueError("isolated=True cannot be combined with shared_memory=True")
            # Not everybody needs another process, and what belongs to one.
            from ublk._isolated import isolate

            more = {"hang_after": hang_after, "workers": workers, "loop_factory": loop_factory}
            more["coalesce_usecs"] = coalesce_usecs
            self._serving = isolate(target, self._serving, self._report, more)
            # Hanging handlers are reported there.
            hang_after = None
        self._serving.die = self._die
        self._description = {
            **shape,
            "kind": type(target).__name__,
            "operations": self._serving.operations,
            "style": self._serving.style,
            "coalesce_usecs": coalesce_usecs,
        }
        self._hang_after = hang_after
        self._options = {
            "queues": number("queues", queues, 32),
            "depth": number("depth", depth, 32),
            "id": None if id is None else number("id", id, 20),
            "recovery": ("reissue" if recoverable else None) if isinstance(recoverable, bool) else recoverable,
            "shared_memory": bool(shared_memory),
        }
        return self

    def _start(self, driver: _ublk.FakeDriver | None) -> None:
        """Make the device and serve it."""
        with _one_start():
            self._start_device(driver)

    def _start_device(self, driver: _ublk.FakeDriver | None) -> None:
        made: list[Native] = []
        try:
            # First: a signal that kills the program would leave a device that was already created.
            _signals.device_started(self)
            self._add(driver, made)
            self._begin()
            if isinstance(self._serving, PullServing):
                self._register()
                # The kernel reads the disk before this is over, and it is the caller who will answer.
                threading.Thread(target=self._go_live_later, name=f"ublk{self.id}start", daemon=True).start()
                return
            self._native.go_live()
            self._register()
        except BaseException:
            self._undo(made)
            raise
        finally:
            if not isinstance(self._serving, PullServing):
                self._start_over.set()

    async def _start_async(self, driver: _ublk.FakeDriver | None) -> None:
        """Make the device and serve it on the running loop."""
        if not isinstance(self._serving, LoopServing):
            raise TypeError(f"{type(self._target).__name__} has no coroutine methods: use start()")
        event_loop("start_async")
        self._serving.is_here = True
        with _one_start():
            await self._start_device_async(driver)

    async def _start_device_async(self, driver: _ublk.FakeDriver | None) -> None:
        made: list[Native] = []
        try:
            _signals.device_started(self)
            await _to_the_end(self._add, driver, made)
            self._begin()
            await _in_thread(self._native.go_live)
            self._register()
        except BaseException:
            # The loop goes on meanwhile: requests may have to be served before the device can go.
            await _to_the_end(self._undo, made)
            raise
        finally:
            self._start_over.set()

    def _add(self, driver: _ublk.FakeDriver | None, made: list[Native]) -> None:
        self._serving.add(self._description, self._options, driver, made)
        self._native = made[0]
        with _running_lock:
            # If the start is interrupted, and its undoing, too, the end of the program sees to the rest.
            _running.add(self)
        self._made()

    def _recover(self, id: int, driver: _ublk.FakeDriver | None) -> None:
        """Serve a device whose last server is gone."""
        with _one_start():
            self._recover_device(id, driver)

    def _recover_device(self, id: int, driver: _ublk.FakeDriver | None) -> None:
        made: list[Native] = []
        try:
            self._serving.recover(self._description, id, driver, made)
            self._native = made[0]
            self._made()
            self._begin()
            self._register()
        except BaseException:
            # Clients of the disk continue to wait.
            for native in made:
                native.abandon()
            self._forget()
            _signals.device_stopped(self)
            raise
        finally:
            self._start_over.set()

    def _begin(self) -> None:
        """Start to take requests, unless another process does."""
        if not isinstance(self._native, _ublk.NativeDevice):
            return
        self._serving.begin(self._native)
        if isinstance(self._serving, PullServing):
            self._serving.requests = Requests(self._native.pull_queues, lambda: self._exception)

    def _register(self) -> None:
        with _running_lock:
            _running.add(self)
        if self._serving.needs_python:
            _interval.shorten(self)
        if self._hang_after is not None and isinstance(self._native, _ublk.NativeDevice):
            _watchdog.watch(self._native, self.path, self._hang_after, self._serving)
        _signals.device_started(self)

    def _undo(self, made: list[Native]) -> None:
        """Leave nothing of a start that failed, or was interrupted between any two of its lines."""
        if not made:
            self._forget()
            _signals.device_stopped(self)
            return
        self._native = made[0]
        with _running_lock:
            _running.add(self)
        try:
            self._end(functools.partial(self._native.stop, STOP_SECONDS))
        finally:
            # What sees to the rest waits for this.
            self._start_over.set()

    def _forget(self) -> None:
        """Take the device for one that does not run."""
        with _running_lock:
            _running.discard(self)
        _interval.restore(self)
        native = getattr(self, "_native", None)
        if isinstance(native, _ublk.NativeDevice):
            _watchdog.forget(native)

    def _go_live_later(self) -> None:
        """Go live while requests are being taken."""
        try:
            self._native.go_live()
        except BaseException as error:
            # Threads that take requests or wait for the device raise it, unless the device was stopped meanwhile.
            if not self._stopped:
                self._exception = error
        finally:
            self._start_over.set()

    @property
    def id(self) -> int:
        """The number N of ``/dev/ublkbN``."""
        return self._native.id

    @property
    def path(self) -> str:
        """Path of the block device, ``/dev/ublkbN``."""
        return str(self._native.path)

    @property
    def queues(self) -> int:
        """Number of hardware queues that the driver created."""
        return self._native.queues

    @property
    def depth(self) -> int:
        """Maximum number of requests in flight per queue."""
        return self._native.depth

    @property
    def size(self) -> int:
        """Capacity in bytes."""
        return int(self._description["size"])

    @property
    def block_size(self) -> int:
        """Logical block size in bytes."""
        return int(self._description["block_size"])

    @property
    def read_only(self) -> bool:
        """Whether the disk is read-only."""
        return bool(self._description["read_only"]) or "write" not in self.operations

    @property
    def operations(self) -> frozenset[str]:
        """Operations that the disk supports besides reads (``write``, ``flush``, ``discard``, ``write_zeroes``)."""
        return frozenset(map(str, self._serving.operations)) - {"read"}

    @property
    def max_io_bytes(self) -> int:
        """Maximum size of a read or write in bytes."""
        return self._native.max_io_bytes

    @property
    def recovery(self) -> str | None:
        """Recovery mode ``queue``, ``reissue`` or ``fail-io``; None if the device is removed with its server."""
        return self._native.recovery

    @property
    def can_be_left(self) -> bool:
        """Whether `quiesce` is supported (recoverable devices, Linux 6.16)."""
        return self._native.can_be_left

    @property
    def info(self) -> DeviceInfo:
        """Information about the device, as the driver reports it."""
        return DeviceInfo(**_ublk.device(self.id))

    @property
    def data(self) -> str:
        """How data moves (``copy``, ``user-copy``, ``zero-copy`` or ``auto-zero-copy``)."""
        return self._native.data

    def stats(self) -> Stats:
        """Return statistics since this process has served the device."""
        return Stats(OpStats._all(self._native.stats()), self._native.entries)

    def resize(self, size: SupportsIndex) -> None:
        """Change the size of the disk while it is in use. Linux 6.16.

        The block device must be able to serve the new size when it grows; its ``size`` follows.
        """
        size = number("size", size, 64)
        self._target._check_size(size)
        self._native.resize(size)
        self._description["size"] = self._target.size = size

    def share_memory(self, file: FileDescriptorLike, *, read_only: bool = False) -> int:
        """Let clients that map the same file do direct I/O with it without a copy. Linux 7.1.

        ``file`` is a memfd, or a file on tmpfs or hugetlbfs, of whole pages and up to 4 GiB, as a descriptor or an
        object with a ``fileno()``. If all of a request's memory is in it, in order, then files that serve the request
        read and write that memory. A handler gets a copy: the client can change its memory at any time, and the file's
        length too, which fails the request. Other requests move as ever. With ``read_only`` only writes use it. The
        device must have been started with ``shared_memory=True``.

        Return a number for `unshare_memory`. Without that, the pages stay pinned until the device goes.
        """
        return self._shareable().share_memory(file, read_only)

    def unshare_memory(self, number: int) -> None:
        """Withdraw shared memory, once no request uses it. Raises `UblkError` with ``ENOENT`` if there is none."""
        self._shareable().unshare_memory(number)

    def _shareable(self) -> _ublk.NativeDevice:
        if not isinstance(self._native, _ublk.NativeDevice) or not self._options["shared_memory"]:
            raise UblkError(errno.EOPNOTSUPP, f"{self.path} was not started with shared_memory=True")
        return self._native

    def quiesce(self) -> None:
        """Complete the requests in flight and leave the disk to another server (`recover`); later requests wait.

        For devices that were started with ``recoverable``. Linux 6.16.
        """
        if self._owner != os.getpid():
            return
        self._check_end()
        if isinstance(self._native, _ublk.NativeDevice) and self._native.served_here:
            raise RuntimeError("this thread also serves the device: it cannot wait for this")
        if self.recovery is None:
            raise UblkError(
                errno.EINVAL, f"{self.path} was not started with recoverable=True: no other server could take it over"
            )
        if self.can_be_left:
            self._end(self._native.leave, hand_over=True)
        else:
            # Says what is missing, and touches nothing.
            self._native.leave()

    @property
    def running(self) -> bool:
        """Whether the device is being served, neither stopped nor about to be."""
        return not self._native.ending

    def requests(self) -> Requests:
        """Return an iterator over the requests of a device that was started with ``pull=True``.

        By ``for`` or ``async for``; several threads and tasks may do so at once. Each `Request` is to be ended by
        whoever has taken it, and may be so at any time and from any thread.
        """
        if not isinstance(self._serving, PullServing):
            raise TypeError("the device was not started with pull=True")
        return self._serving.requests

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until the device's node is ready; returns at once unless the device was started with ``pull=True``.

        Return whether it was within ``timeout`` seconds. Raises what the start failed with.
        """
        over = self._start_over.wait(None if timeout is None else min(timeout, _LONGEST_POLL))
        if self._exception is not None:
            raise self._exception
        return over

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the device begins to end, stopped by another thread or deleted by any process.

        Return whether it did so within ``timeout`` seconds; without a timeout, wait for ever. An exception
        that a handler ended the device with (`SystemExit`, say) is raised here. In the main thread Ctrl-C
        interrupts the wait with `KeyboardInterrupt`.
        """
        if timeout is not None and timeout != timeout:
            raise ValueError("timeout = nan: must be a number of seconds, or None")
        poller = select.poll()
        poller.register(self._native.fileno(), select.POLLIN)
        deadline = None if timeout is None else time.monotonic() + timeout
        with _signals.wakeup_fd() as signalled:
            if signalled is not None:
                poller.register(signalled, select.POLLIN)
            while not self._native.ending:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                poller.poll(None if left is None else min(left, _LONGEST_POLL) * 1000)
                if signalled is not None:
                    _signals.drain(signalled)
        # The thread that starts a pulling device is about to report what went wrong.
        self._start_over.wait(_JOIN_SECONDS)
        if self._exception is not None:
            raise self._exception
        return True

    async def wait_async(self) -> None:
        """Wait until the device begins to end, without blocking the event loop. Raises like `wait`."""
        loop = event_loop("wait_async")
        ending = asyncio.Event()
        # A loop knows one reader for each descriptor.
        descriptor = os.dup(self._native.fileno())
        try:
            loop.add_reader(descriptor, ending.set)
            with _signals.waking(loop):
                await ending.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        if self._exception is not None:
            raise self._exception

    def stop(self, timeout: float | None = STOP_SECONDS, *, cancel: bool = False) -> None:
        """Stop and delete the device. Calling it again has no effect.

        What becomes of requests that are in flight:

        1. They are finished first. This waits for that for ``timeout`` seconds, or without a limit if it is ``None``.
        2. After that, those that still have not ended fail with ``EIO``, the device is deleted, and this raises
           `UblkError` with ``EIO``: requests that the program has taken and keeps, those that ``workers`` are at work
           on, and those of tasks, which are cancelled. Methods that are still running go on without their request.
        3. With ``cancel``, tasks are cancelled at once, 1 and 2 take a second at most, and nothing is raised for
           requests that fail. A method that still runs is logged: keep open what it uses.
        4. A method that still runs on the thread of its queue (without ``workers``) keeps its request. After a few
           seconds this raises `UblkError` with ``ETIMEDOUT``: the device is still there, and stopping it again tries
           again. A program that ends leaves without such a method: it exits with status 1, which fails the request,
           and another process removes the device then.

        The process of an isolated device ends with it, and so do methods that still run there. If it does not stop the
        device, in place of 4, it is killed: that fails its requests, and this raises `UblkError` with ``EIO``, or logs
        it with ``cancel``. Only a recoverable device is kept then, as in 4.

        In the main thread Ctrl-C, or what another signal's handler raises, ends the wait at once, and the stop goes on
        in the background as after ``timeout``. Once the program ends, the first signal ends the waits, and the second
        the process; so does the first one if a wait was ended before.

        In a handler of another device whose thread serves this one, too, the stop goes on in the background. A
        recoverable device that another process has asked to wait for another server is left to that; its requests do
        not fail, since a method that still runs would write beside the next server, which has to wait for it. In a
        forked child this does nothing: the device is its parent's.

        Raises `RuntimeError` in a handler of this device, which would wait for itself: raise `SystemExit` there.
        """
        if self._owner != os.getpid():
            return
        seconds = _seconds(timeout)
        self._check_end()
        native = self._native
        if isinstance(native, _ublk.NativeDevice) and native.served_here:
            stop = functools.partial(self._stop_quietly, seconds, cancel)
            threading.Thread(target=stop, name="ublk-stop", daemon=True).start()
            return
        self._stop(seconds, cancel)

    async def stop_async(self, timeout: float | None = STOP_SECONDS, *, cancel: bool = False) -> None:
        """Stop and delete the device like `stop`, without blocking the event loop, which serves it meanwhile.

        Raises `RuntimeError` in a task that serves a request of this device, which would wait for itself: leave it to
        another task, or raise `SystemExit`.
        """
        if self._owner != os.getpid():
            return
        seconds = _seconds(timeout)
        event_loop("stop_async")
        self._serving.check_task()
        await _to_the_end(self._stop, seconds, cancel)

    def _check_end(self) -> None:
        """Raise in a handler of this device, or on the event loop that serves it."""
        native = self._native
        if isinstance(native, _ublk.NativeDevice) and native.in_handler:
            raise RuntimeError("a handler cannot wait for its own device to stop; raise SystemExit instead")
        self._serving.check_task()
        self._serving.check_loop()

    def _stop(self, seconds: float = STOP_SECONDS, cancel: bool = False) -> None:
        if cancel:
            seconds = min(seconds, _CANCEL_SECONDS)
        native = self._native
        is_over = native.stopped
        self._end_in(seconds, cancel)
        if is_over or not native.revoked:
            return
        hurried = isinstance(native, _ublk.NativeDevice) and native.hurried
        when = "when the wait for them was interrupted" if hurried else f"after {seconds:g} s"
        text = f"{self.path}: {native.revoked} requests unfinished {when}; they failed, the device is deleted"
        if not cancel:
            raise UblkError(errno.EIO, text)
        log(logging.WARNING, "%s; a method that still runs may still write: keep what it uses", text)

    def _end_in(self, seconds: float, cancel: bool) -> None:
        """Stop the device, whatever requests have to be taken back for that."""
        if cancel:
            self._serving.cancel()
        self._end(functools.partial(self._native.stop, seconds))

    def _end(self, end: Callable[[], None], *, hand_over: bool = False) -> None:
        self._stopped = True
        try:
            try:
                if hand_over:
                    # From here on no stop deletes the disk under its users, whatever interrupts this.
                    self._native.hand_over()
                self._serving.abandon()
            finally:
                # Whatever that has raised.
                end()
        except BaseException as error:
            # It may still have to be stopped, by a handler's exit say.
            self._stopped = self._native.stopped
            interrupted = not isinstance(error, Exception)
            self._hangs = isinstance(error, UblkError) and error.errno == errno.ETIMEDOUT
            if self._hangs and sys.excepthook is sys.__excepthook__:
                # The handler may be stuck in writing to a full stderr, where each signal would end one write only.
                sys.excepthook = _print_in_time
            if interrupted and not self._stopped:
                if hand_over:
                    # Perhaps not done above.
                    self._native.hand_over()
                self._hurried = True
                # The stop in the background is over soon, and this thread then does the rest.
                self._native.expedite()
                with contextlib.suppress(RuntimeError):
                    threading.Thread(target=self._stop_quietly, name="ublk-stop", daemon=True).start()
            raise
        finally:
            # After a time-out it still runs, and may be stopped again.
            if self._native.stopped:
                self._over()

    def _over(self) -> None:
        """Let go of everything that a device has while it runs."""
        self._forget()
        _signals.device_stopped(self)
        self._serving.cancel()
        self._serving.release()
        for key, count in self._failures.rest().items():
            log(logging.ERROR, "%s failed %d more times", key, count)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop_async()

    def __repr__(self) -> str:
        state = "running" if self.running else "ended"
        return f"<ublk.Device {self.path} {state}: {type(self._target).__name__}, {self.size} bytes>"

    def _report(self, operation: str, exception: BaseException) -> None:
        """Take an exception of a handler that is no errno; called on a queue's thread."""
        name = f"{type(self._target).__name__}.{operation}"
        if isinstance(exception, Exception):
            left_out = self._failures.admit(f"{name} ({type(exception).__name__})")
            if left_out is not None:
                log(logging.ERROR, "%s failed; the request gets EIO%s", name, also(left_out), error=exception)
            return
        try:
            log(logging.ERROR, "%s raised %s; the device stops", name, type(exception).__name__)
        finally:
            self._die(exception)

    def _die(self, exception: BaseException) -> None:
        """Stop the device, and pass the exception to the threads that wait for it."""
        if self._stopped or not self._stopping.acquire(blocking=False):
            return
        self._exception = exception
        # The thread that runs this has to go on serving until the device is stopped.
        threading.Thread(target=self._stop_quietly, name="ublk-stop", daemon=True).start()

    def _is_hung(self) -> bool:
        """Whether a handler has made a stop time out, and is still running."""
        native = self._native
        return self._hangs and isinstance(native, _ublk.NativeDevice) and bool(native.busy())

    def _stop_quietly(self, seconds: float = STOP_SECONDS, cancel: bool = False) -> None:
        # A handler may end the device before `start` has finished with it, or given it up.
        self._start_over.wait()
        try:
            if hasattr(self, "_native"):
                self._stop(seconds, cancel)
        except UblkError as error:
            name = getattr(self._native, "path", "a device that was being started")
            log(logging.ERROR, "stopping %s: %s", name, error)


def _print_in_time(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
    """Print an exception as the interpreter does, and wait for that for a second at most."""
    in_time(functools.partial(sys.__excepthook__, kind, value, traceback))


def _nothing() -> None:
    """Do nothing."""


def _seconds(timeout: float | None) -> float:
    """Check a time-out."""
    if timeout is None:
        return _FOREVER
    if not timeout >= 0:
        raise ValueError(f"timeout = {timeout}: must be at least 0 seconds, or None")
    return min(float(timeout), _FOREVER)


def _in_thread(function: Callable[..., None], *arguments: object) -> asyncio.Future[None]:
    """Call a function in a thread of its own.

    Those of the loop's executor may all be in calls of handlers, which wait for what this is to end.
    """
    loop = asyncio.get_running_loop()
    over = loop.create_future()

    def settle(error: BaseException | None) -> None:
        # It may have been cancelled.
        if over.done():
            return
        if error is None:
            over.set_result(None)
        else:
            over.set_exception(error)

    def call() -> None:
        error: BaseException | None = None
        try:
            function(*arguments)
        except BaseException as raised:
            error = raised
        # The loop may be closed by now.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, error)

    # A daemon: the interpreter joins others before it runs the exit handlers, which end such waits.
    run = contextvars.copy_context().run
    threading.Thread(target=run, args=(call,), name="ublk-call", daemon=True).start()
    return over


async def _to_the_end(function: Callable[..., None], *arguments: object) -> None:
    """Call a function in a thread, and wait for its end even when cancelled."""
    call = _in_thread(function, *arguments)
    cancelled: asyncio.CancelledError | None = None
    while not call.done():
        try:
            await asyncio.wait([call])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    call.result()


def _stop_all() -> None:
    """Remove all devices when the interpreter exits, whatever loggers and signal handlers raise."""
    for _ in range(_ATTEMPTS):
        try:
            again = any(device._hurried for device in list(_running))
            with _signals.hurrying(_expedite_all, again=again):
                _stop_running()
            return
        except BaseException:
            # From a signal's handler, at any place; again, with what is left.
            continue


def _expedite_all() -> None:
    """End all waits for handlers."""
    for device in list(_running):
        device._native.expedite()


@contextlib.contextmanager
def _one_start() -> Iterator[None]:
    """Have the end of the program wait for a start, and refuse starts after that."""
    global _starting
    with _running_lock:
        if _exiting:
            raise RuntimeError("the interpreter is shutting down")
        _starting += 1
    try:
        yield
    finally:
        with _running_lock:
            _starting -= 1


def _stop_running() -> None:
    global _exiting
    end_soon()
    deadline = time.monotonic() + STOP_SECONDS
    hang = False
    with _running_lock:
        _exiting = True
    # By other threads; what they have started is to be stopped, too.
    while _starting and time.monotonic() < deadline:
        time.sleep(0.01)
    for device in list(_running):
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
        # The interpreter's end would take away what a thread needs that is still in a handler. Before anything is
        # written, which a signal may end.
        removal = leave_removal(list(_running))
        _try(log, logging.CRITICAL, "a handler is stuck; exiting immediately%s", removal)
        _try(in_time, functools.partial(_try, sys.stderr.flush))
        _try(functools.partial(in_time, always=True), functools.partial(_try, sys.stdout.flush))
        os._exit(1)
    deadline = time.monotonic() + _JOIN_SECONDS
    for thread in running():
        thread.join(max(0.0, deadline - time.monotonic()))


# Run with this package's directory, the number of a process, and those of its devices.
_REMOVER = """
import sys
sys.stdin.read()
sys.path.append(sys.argv[1])
from ublk import _ublk
for id in map(int, sys.argv[3:]):
    try:
        if _ublk.device(id)["pid"] in (None, int(sys.argv[2])):
            _ublk.delete(id, True)
    except OSError as error:
        sys.stderr.write(f"ublk: removing /dev/ublkb{id}: {error}; `ublk del --dead` tries again\\n")
"""


def leave_removal(devices: Iterable[Device], *, recoverable: bool = False) -> str:
    """Have another process remove devices of this one, once that has ended; return what a message says of that.

    Those that can be recovered are left to another server, unless ``recoverable``.
    """
    ids: list[int] = []
    kept: list[int] = []
    for device in devices:
        native = device._native
        if isinstance(native, _ublk.NativeDevice) and native.on_kernel and not native.stopped:
            (ids if recoverable or native.recovery is None else kept).append(native.id)
    text = "".join(f"; /dev/ublkb{id} waits for another server: ublk.recover({id}, ...)" for id in kept)
    if not ids:
        return text
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # Isolated: code in the working directory, and what the environment names, is not to run.
    command = [sys.executable, "-I", "-c", _REMOVER, package, str(os.getpid()), *map(str, ids)]
    try:
        # It begins when the pipe ends, with this process. It may not be interrupted with this one.
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd="/", start_new_session=True)
    except Exception as error:
        return f"{text}; `ublk del --dead` removes its devices ({error})"
    return f"{text}; its devices are removed after that"


def _try(function: Callable[..., object], *arguments: object) -> None:
    """Call something of the program's that must not keep devices from being stopped."""
    with contextlib.suppress(BaseException):
        function(*arguments)


# Handlers run from the last to the first: when all devices are stopped, their threads are kept out of the interpreter.
atexit.register(_ublk.close_gate, _LEAVE_SECONDS)
atexit.register(_stop_all)


def _in_forked_child() -> None:
    """Forget the parent's devices, and the lock that one of its threads may have held."""
    global _running_lock, _starting
    _ublk.after_fork()
    _running_lock = threading.Lock()
    _starting = 0
    _running.clear()


os.register_at_fork(after_in_child=_in_forked_child)


def run(
    target: BlockDevice | NativeDisk,
    *,
    queues: int = 1,
    depth: int = 128,
    id: int | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> None:
    """Serve a block device until Ctrl-C, SIGTERM or its deletion by another process, then return.

    Prints the device's path when it can be used, unless ``quiet``. The arguments are those of
    `BlockDevice.start`. An exception that a handler ended the device with is raised here.
    """
    more: dict[str, Any] = {} if workers is None else {"workers": workers}
    with (
        contextlib.suppress(KeyboardInterrupt, _signals.Terminated),
        target.start(queues=queues, depth=depth, id=id, **more) as device,
    ):
        if not quiet:
            print(device.path, flush=True)
        device.wait()


def recover(
    id: int,
    target: BlockDevice | NativeDisk,
    *,
    hang_after: float | None = HANG_SECONDS,
    workers: int | None = None,
    pull: bool = False,
    loop_factory: LoopFactory | None = None,
    isolated: bool = False,
    coalesce_usecs: int = 0,
    _driver: _ublk.FakeDriver | None = None,
) -> Device:
    """Serve a recoverable device whose server has left, and return when its disk works again.

    The device was started with ``recoverable``, by whatever program. It keeps its shape and queues; the block device
    has to fit them. Of a server that has just died this waits for the driver to notice. Requests that have waited
    are served then.

    Raises `UblkError` with ``EBUSY`` if a living process serves the device, and with ``EINVAL`` if it was not made to
    be recovered, `ValueError` if the block device does not fit or is a disk in memory.
    """
    target._check_recovery()
    device = Device._make(
        target,
        1,
        1,
        None,
        hang_after=hang_after,
        workers=workers,
        pull=pull,
        loop_factory=loop_factory,
        isolated=isolated,
        coalesce_usecs=coalesce_usecs,
    )
    device._recover(number("id", id, 20), _driver)
    return device
