# SPDX-License-Identifier: MIT OR Apache-2.0

"""Running devices."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import select
import threading
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from ublk import _signals, _ublk
from ublk._errors import UblkError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from ublk._block_device import BlockDevice

logger = logging.getLogger("ublk")

_JOIN_SECONDS = 5.0
_running: set[Device] = set()
_running_lock = threading.Lock()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What the driver knows about a device, whoever made it."""

    id: int
    path: str
    state: str
    """``LIVE``; ``DEAD`` without a disk; ``QUIESCED`` or ``FAIL_IO`` while its server is gone."""
    pid: int
    """The server's process, -1 without one."""
    queues: int
    depth: int
    size: int
    block_size: int
    max_io_bytes: int
    read_only: bool


class Device:
    """A running block device; made by `BlockDevice.start`.

    A context manager: leaving the block stops and deletes the device, also by an exception. All methods
    may be called from any thread.
    """

    def __init__(self) -> None:
        raise TypeError("a Device is made by BlockDevice.start()")

    _native: _ublk.NativeDevice
    _target: BlockDevice
    _size: int
    _block_size: int
    _exception: BaseException | None
    _owner: int
    _start_over: threading.Event
    _stopping: threading.Lock

    @classmethod
    def _start(
        cls, target: BlockDevice, *, queues: int, depth: int, id: int | None, driver: _ublk.FakeDriver | None
    ) -> Device:
        name = type(target).__name__
        if not hasattr(target, "size"):
            raise TypeError(f"{name} has no size: its __init__ must call super().__init__(size=...)")
        handlers: dict[str, Any] = {
            method: target._overridden(method) for method in ("read", "write", "flush", "discard", "write_zeroes")
        }
        if handlers["read"] is None:
            raise TypeError(f"{name} has no read(self, offset, buf) method")
        self = object.__new__(cls)
        self._target = target
        self._size = target.size
        self._block_size = target.block_size
        self._exception = None
        self._start_over = threading.Event()
        self._stopping = threading.Lock()
        self._owner = os.getpid()
        handlers["report"] = self._report
        shape = {
            "size": _number("size", target.size, 64),
            "block_size": _number("block_size", target.block_size, 32),
            "physical_block_size": _number("physical_block_size", target.physical_block_size, 32),
            "max_io_bytes": _number("max_io_bytes", target.max_io_bytes, 32),
            "discard_granularity": _number("discard_granularity", target.discard_granularity, 32),
            "rotational": bool(target.rotational),
            "read_only": bool(target.read_only),
        }
        queues = _number("queues", queues, 32)
        depth = _number("depth", depth, 32)
        id = None if id is None else _number("id", id, 20)
        made: list[_ublk.NativeDevice] = []
        try:
            _ublk.start(name, shape, handlers, queues, depth, id, _spawn, driver, made)
            self._native = made[0]
            with _running_lock:
                _running.add(self)
            _signals.device_started()
        except BaseException:
            # A signal's exception, Ctrl-C say, may come between any two lines above.
            for native in made:
                native.stop()
            with _running_lock:
                _running.discard(self)
            raise
        finally:
            self._start_over.set()
        return self

    @property
    def id(self) -> int:
        """The number N of ``/dev/ublkbN``."""
        return self._native.id

    @property
    def path(self) -> str:
        """The block device's node, ``/dev/ublkbN``."""
        return str(self._native.path)

    @property
    def queues(self) -> int:
        """How many hardware queues the driver made."""
        return self._native.queues

    @property
    def depth(self) -> int:
        """How many requests each queue holds."""
        return self._native.depth

    @property
    def size(self) -> int:
        """Capacity in bytes."""
        return self._size

    @property
    def block_size(self) -> int:
        """Logical block size in bytes."""
        return self._block_size

    @property
    def max_io_bytes(self) -> int:
        """Longest read or write in bytes."""
        return self._native.max_io_bytes

    @property
    def running(self) -> bool:
        """Whether the device is served: neither stopped nor about to be."""
        return not self._native.ending

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the device begins to end: stopped by another thread, or deleted by anyone.

        Return whether it did so within ``timeout`` seconds; without a timeout, wait for ever. An exception
        that a handler ended the device with (`SystemExit`, say) is raised here. In the main thread Ctrl-C
        interrupts the wait with `KeyboardInterrupt`.
        """
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
                poller.poll(None if left is None else left * 1000)
                if signalled is not None:
                    _signals.drain(signalled)
        if self._exception is not None:
            raise self._exception
        return True

    def stop(self) -> None:
        """Stop and delete the device. Requests in flight are finished first; again is harmless.

        Raises `UblkError` with ``ETIMEDOUT`` if a handler does not return within a minute, and
        `RuntimeError` in a handler, which would wait for itself: raise `SystemExit` there. In a forked
        child it does nothing: the device is its parent's.
        """
        if self._owner != os.getpid():
            return
        if threading.current_thread() in _threads:
            raise RuntimeError("a handler cannot wait for its own device to stop; raise SystemExit instead")
        try:
            self._native.stop()
        finally:
            # After a time-out it still runs, and may be stopped again.
            if self._native.stopped:
                with _running_lock:
                    known = self in _running
                    _running.discard(self)
                if known:
                    _signals.device_stopped()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = "running" if self.running else "ended"
        return f"<ublk.Device {self.path} {state}: {type(self._target).__name__}, {self._size} bytes>"

    def _report(self, operation: str, exception: BaseException) -> None:
        """Take an exception of a handler that is no errno; called on a queue's thread."""
        name = f"{type(self._target).__name__}.{operation}"
        if isinstance(exception, Exception):
            logger.error("%s failed; the request gets EIO", name, exc_info=exception)
            return
        logger.error("%s raised %s; the device stops", name, type(exception).__name__)
        if not self._stopping.acquire(blocking=False):
            return
        self._exception = exception
        # The thread that runs this has to go on serving until the device is stopped.
        threading.Thread(target=self._stop_quietly, name="ublk-stop", daemon=True).start()

    def _stop_quietly(self) -> None:
        # A handler may end the device before `start` has finished with it, or given it up.
        self._start_over.wait()
        try:
            if hasattr(self, "_native"):
                self.stop()
        except UblkError as error:
            logger.error("stopping %s: %s", self.path, error)


def _number(name: str, value: object, bits: int) -> int:
    """Check an integer before it becomes one of Rust's."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name} = {value}: 0 to {(1 << bits) - 1} are possible")
    return value


def _spawn(name: str, body: Callable[[], None]) -> None:
    """Start a thread that serves queues."""
    # A daemon, because the interpreter joins the others before it runs exit handlers: `_stop_all` below
    # ends and joins these.
    thread = threading.Thread(target=body, name=name, daemon=True)
    _threads.add(thread)
    thread.start()


def _stop_all() -> None:
    """Leave nothing behind when the interpreter exits."""
    with _running_lock:
        devices = [device for device in _running if device._owner == os.getpid()]
    for device in devices:
        logger.warning("%s was still running when the program ended", device.path)
        try:
            device.stop()
        except UblkError as error:
            logger.error("stopping %s: %s", device.path, error)
    for thread in list(_threads):
        thread.join(_JOIN_SECONDS)


atexit.register(_stop_all)


def run(target: BlockDevice, *, queues: int = 1, depth: int = 128, id: int | None = None, quiet: bool = False) -> None:
    """Serve a block device until Ctrl-C, SIGTERM or its deletion by somebody else, then return.

    Prints the device's path when it can be used, unless ``quiet``. The arguments are those of
    `BlockDevice.start`. An exception that a handler ended the device with is raised here.
    """
    with (
        contextlib.suppress(KeyboardInterrupt, _signals.Terminated),
        target.start(queues=queues, depth=depth, id=id) as device,
    ):
        if not quiet:
            print(device.path, flush=True)
        device.wait()


def devices() -> list[DeviceInfo]:
    """List the devices of the system, whoever made them."""
    return [DeviceInfo(**info) for info in _ublk.devices()]


def features() -> dict[str, bool]:
    """Tell which of the features that this library knows the running driver offers."""
    return _ublk.features()
