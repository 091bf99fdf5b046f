# SPDX-License-Identifier: MIT OR Apache-2.0

"""Running devices."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import select
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

from ublk import _interval, _lifecycle, _signals, _ublk, _watchdog
from ublk._errors import UblkError
from ublk._lifecycle import STOP_SECONDS
from ublk._log import Limiter, also, in_time, log
from ublk._numbers import number
from ublk._running_loop import event_loop, to_the_end
from ublk._serving import Hooks
from ublk._stats import OpStats, Stats
from ublk._system import DeviceInfo

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from _typeshed import FileDescriptorLike

    from ublk._block_device import BlockDevice
    from ublk._native import NativeDisk
    from ublk._options import Options
    from ublk._requests import Requests
    from ublk._serving import Native, Serving

# How long `wait` waits for a start in progress, whose failure it raises.
_START_SECONDS = 5.0
# How long a stop that cancels waits for handlers.
_CANCEL_SECONDS = 1.0
# The kernel counts milliseconds in 31 bits.
_LONGEST_POLL = 1_000_000.0
# Longer than any device is served.
_FOREVER = float(1 << 31)


class Device:
    """Running block device; returned by `BlockDevice.start`.

    A context manager: leaving the block, also by an exception, stops and deletes the device. All methods may be called
    from any thread.
    """

    def __init__(self) -> None:
        raise TypeError("use BlockDevice.start() to create a Device")

    _native: Native
    _target: BlockDevice | NativeDisk
    _shape: dict[str, Any]
    _options: Options
    _serving: Serving
    _exception: BaseException | None
    _stopped: bool
    # Whether a handler was still running when a stop timed out.
    _hangs: bool
    # Whether a signal handler interrupted the wait of a stop.
    _hurried: bool
    _owner: int
    # Set once the start has succeeded or failed.
    _start_over: threading.Event
    _stopping: threading.Lock
    _failures: Limiter
    # Called when the device was created, before it is live.
    _made: Callable[[], None]

    @classmethod
    def _make(cls, target: BlockDevice | NativeDisk, options: Options) -> Device:
        """Check everything that can be checked without the driver, and return a device that is not created yet."""
        self = object.__new__(cls)
        self._target = target
        self._options = options
        self._exception = None
        self._stopped = False
        self._hangs = False
        self._hurried = False
        self._start_over = threading.Event()
        self._stopping = threading.Lock()
        self._failures = Limiter()
        self._made = _nothing
        self._owner = os.getpid()
        self._shape = target._describe()
        hooks = Hooks(self._report, self._die, lambda: self._exception)
        self._serving = target._serve(hooks, options)
        if options.isolated:
            # Imports `multiprocessing`, which most programs do not need.
            from ublk._isolated import IsolatedServing

            self._serving.check_isolated()
            self._serving = IsolatedServing(target, self._serving, hooks, options)
        return self

    def _forget(self) -> None:
        """Withdraw the device from everything that looks at running devices."""
        _lifecycle.discard(self)
        _interval.restore(self)
        native = getattr(self, "_native", None)
        if native is not None:
            _watchdog.forget(native)

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
        return int(self._shape["size"])

    @property
    def block_size(self) -> int:
        """Logical block size in bytes."""
        return int(self._shape["block_size"])

    @property
    def read_only(self) -> bool:
        """Whether the disk is read-only."""
        return bool(self._shape["read_only"]) or "write" not in self.operations

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
    def can_quiesce(self) -> bool:
        """Whether `quiesce` is supported (recoverable devices, Linux 6.16)."""
        return self._native.can_quiesce

    @property
    def info(self) -> DeviceInfo:
        """Information about the device, as the driver reports it."""
        return DeviceInfo(**_ublk.device(self.id))

    @property
    def data_movement(self) -> str:
        """How data moves (``copy``, ``user-copy``, ``zero-copy`` or ``auto-zero-copy``)."""
        return self._native.data_movement

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
        self._shape["size"] = self._target.size = size

    def share_memory(self, file: FileDescriptorLike, *, read_only: bool = False) -> int:
        """Let clients that map the same file do direct I/O with it without a copy. Linux 7.1.

        ``file`` is a memfd, or a file on tmpfs or hugetlbfs, of whole pages and up to 4 GiB, as a descriptor or an
        object with a ``fileno()``. If the memory of a request is a contiguous part of it, then files that serve the
        request read and write that memory directly. A handler gets a copy, since the client can change its memory at
        any time. It can also truncate the file, which fails the request. Other requests are handled as usual.
        With ``read_only`` only writes use the memory. The device must have been started with ``shared_memory=True``.

        Return a number for `unshare_memory`. The pages stay pinned until that is called or the device is deleted.
        """
        return self._shareable().share_memory(file, read_only)

    def unshare_memory(self, number: int) -> None:
        """Unshare memory once no request uses it. Raises `UblkError` with ``ENOENT`` for an unknown number."""
        self._shareable().unshare_memory(number)

    def _shareable(self) -> _ublk.NativeDevice:
        if not isinstance(self._native, _ublk.NativeDevice) or not self._options.shared_memory:
            raise UblkError(errno.EOPNOTSUPP, f"{self.path} was not started with shared_memory=True")
        return self._native

    def quiesce(self) -> None:
        """Complete the requests in flight and leave the disk to another server (`recover`); later requests wait.

        For devices that were started with ``recoverable``. Linux 6.16.
        """
        if self._owner != os.getpid():
            return
        self._check_end()
        if self._native.served_here:
            raise RuntimeError("this thread also serves the device and cannot wait for it to quiesce")
        if self.recovery is None:
            raise UblkError(
                errno.EINVAL, f"{self.path} was not started with recoverable=True: no other server can recover it"
            )
        if self.can_quiesce:
            self._end(self._native.leave, hand_over=True)
        else:
            # Raises an error that says what is missing, and changes nothing.
            self._native.leave()

    @property
    def running(self) -> bool:
        """Whether the device is being served; False once it has begun to end, and in a forked child."""
        return not self._native.ending

    def requests(self) -> Requests:
        """Return an iterator over the requests of a device that was started with ``pull=True``.

        Several threads and tasks may iterate concurrently, with ``for`` or ``async for``. The program completes or
        fails each `Request`, at any time and from any thread.
        """
        return self._serving.requests

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until the device's node is ready; returns at once unless the device was started with ``pull=True``.

        Return False if it is not ready after ``timeout`` seconds. Raises the exception that the start failed with.
        """
        over = self._start_over.wait(None if timeout is None else min(timeout, _LONGEST_POLL))
        if self._exception is not None:
            raise self._exception
        return over

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the device begins to end, stopped by another thread or deleted by any process.

        Return False if it has not begun after ``timeout`` seconds; by default there is no limit. Raises the exception
        with which a handler ended the device, such as `SystemExit`. In the main thread Ctrl-C interrupts the wait with
        `KeyboardInterrupt`.
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
        # The thread that starts a device with pull=True is about to report its failure.
        self._start_over.wait(_START_SECONDS)
        if self._exception is not None:
            raise self._exception
        return True

    async def wait_async(self) -> None:
        """Wait until the device begins to end, without blocking the event loop. Raises like `wait`."""
        loop = event_loop("wait_async")
        import asyncio

        ending = asyncio.Event()
        # A loop has one reader for each descriptor.
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

    def stop(self, timeout: float | None = 30.0, *, cancel: bool = False) -> None:
        """Stop and delete the device. Calling it again has no effect.

        Requests in flight:

        1. This waits up to ``timeout`` seconds for them to end, or without a limit if it is ``None``.
        2. Requests that have not ended by then fail with ``EIO``, the device is deleted, and this raises `UblkError`
           with ``EIO``. That applies to requests that the program has taken, that ``workers`` handle, and that tasks
           serve; the tasks are cancelled. Methods that are still running continue without their request.
        3. With ``cancel``, tasks are cancelled at once, steps 1 and 2 take at most a second, and failed requests raise
           nothing. A method that is still running is logged: keep open what it uses.
        4. A method that is still running on the thread of its queue (without ``workers``) keeps its request. After a
           few seconds this raises `UblkError` with ``ETIMEDOUT``. The device still exists, and calling this again
           retries. A program that ends in this state exits with status 1, which fails the request, and leaves a process
           that removes the device.

        The process of an isolated device ends with the device, and so do methods that are still running there. If the
        process does not stop the device, step 4 is different: the process is killed, which fails its requests, and this
        raises `UblkError` with ``EIO``, or logs it with ``cancel``. Only a recoverable device is kept as in step 4.

        In the main thread, Ctrl-C or an exception of another signal handler ends the wait at once, and the stop
        continues in the background as after ``timeout``. While the program exits, the first signal ends all waits, and
        the second one ends the process; so does the first one if a wait was interrupted before.

        In a handler of another device whose thread also serves this one, the stop continues in the background. If
        another process has quiesced the device, it is left to another server. Its requests do not fail then: a method
        that is still running would write concurrently with the next server, which has to wait for it. In a forked child
        this does nothing, because the device belongs to the parent.

        Raises `RuntimeError` in a handler of this device, which would wait for itself: raise `SystemExit` there.
        """
        if self._owner != os.getpid():
            return
        seconds = _seconds(timeout)
        self._check_end()
        if self._native.served_here:
            stop = functools.partial(self._stop_quietly, seconds, cancel)
            threading.Thread(target=stop, name="ublk-stop", daemon=True).start()
            return
        self._stop(seconds, cancel)

    async def stop_async(self, timeout: float | None = 30.0, *, cancel: bool = False) -> None:
        """Stop and delete the device like `stop`, without blocking the event loop, which serves it meanwhile.

        Raises `RuntimeError` in a task that serves a request of this device, which would wait for itself: call it in
        another task, or raise `SystemExit`.
        """
        if self._owner != os.getpid():
            return
        seconds = _seconds(timeout)
        event_loop("stop_async")
        self._serving.check_task()
        await to_the_end(self._stop, seconds, cancel)

    def _check_end(self) -> None:
        """Raise in a handler of this device, or on the event loop that serves it."""
        if self._native.in_handler:
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
        when = "when the wait for them was interrupted" if native.hurried else f"after {seconds:g} s"
        text = f"{self.path}: {native.revoked} requests unfinished {when}; they failed, the device is deleted"
        if not cancel:
            raise UblkError(errno.EIO, text)
        log(logging.WARNING, "%s; a method that still runs may still write: keep what it uses", text)

    def _end_in(self, seconds: float, cancel: bool) -> None:
        """Stop the device, and fail the requests that have not ended in time."""
        if cancel:
            self._serving.cancel()
        self._end(functools.partial(self._native.stop, seconds))

    def _end(self, end: Callable[[], None], *, hand_over: bool = False) -> None:
        self._stopped = True
        try:
            try:
                if hand_over:
                    # From here on no stop deletes the disk while it is in use, whatever interrupts this.
                    self._native.hand_over()
                self._serving.abandon()
            finally:
                # Also if that has raised.
                end()
        except BaseException as error:
            # It may still have to be stopped, after `SystemExit` in a handler for example.
            self._stopped = self._native.stopped
            interrupted = not isinstance(error, Exception)
            self._hangs = isinstance(error, UblkError) and error.errno == errno.ETIMEDOUT
            if self._hangs and sys.excepthook is sys.__excepthook__:
                # The handler may be blocked by a full stderr, where each signal would end one write only.
                sys.excepthook = _print_in_time
            if interrupted and not self._stopped:
                if hand_over:
                    # It may have been interrupted above.
                    self._native.hand_over()
                self._hurried = True
                # Ends the wait of the stop in the background; this thread then does the rest.
                self._native.expedite()
                with contextlib.suppress(RuntimeError):
                    threading.Thread(target=self._stop_quietly, name="ublk-stop", daemon=True).start()
            raise
        finally:
            # After a time-out the device still runs, and may be stopped again.
            if self._native.stopped:
                self._over()

    def _over(self) -> None:
        """Release everything that the device has while it runs."""
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
        """Handle an exception of a handler that is not an errno; called on a queue's thread."""
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
        # The calling thread has to continue serving until the device is stopped.
        threading.Thread(target=self._stop_quietly, name="ublk-stop", daemon=True).start()

    def _is_hung(self) -> bool:
        """Whether a stop timed out because of a handler that is still running."""
        return self._hangs and bool(self._native.busy())

    def _stop_quietly(self, seconds: float = STOP_SECONDS, cancel: bool = False) -> None:
        # A handler may end the device before `start` has succeeded or failed.
        self._start_over.wait()
        try:
            if hasattr(self, "_native"):
                self._stop(seconds, cancel)
        except UblkError as error:
            name = getattr(self._native, "path", "a device that was being started")
            log(logging.ERROR, "stopping %s: %s", name, error)


def _print_in_time(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
    """Print an exception like the interpreter, and wait for that for a second at most."""
    in_time(functools.partial(sys.__excepthook__, kind, value, traceback))


def _nothing() -> None:
    """Do nothing."""


def _seconds(timeout: float | None) -> float:
    """Return a time-out in seconds. Raises `ValueError` for negative ones and NaN."""
    if timeout is None:
        return _FOREVER
    if not timeout >= 0:
        raise ValueError(f"timeout = {timeout}: must be at least 0 seconds, or None")
    return min(float(timeout), _FOREVER)
