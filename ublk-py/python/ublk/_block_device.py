# SPDX-License-Identifier: MIT OR Apache-2.0

"""Base class of block devices written in Python."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, SupportsIndex

from ublk import _lifecycle, _methods, _start
from ublk._device import Device
from ublk._numbers import number
from ublk._options import Options
from ublk._requests import Op
from ublk._threads import threads as _threads
from ublk._ublk import Extents, check
from ublk._zones import ZoneCondition

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
    from typing import TypeAlias, TypeVar

    from ublk._options import LoopFactory
    from ublk._serving import Hooks, Serving
    from ublk._ublk import Extent, Request, Zeros
    from ublk._zones import Zone

    Result = TypeVar("Result")
    # The result of a plain method or of a coroutine method.
    MaybeAsync: TypeAlias = Result | Awaitable[Result]

# What `BlockDevice.__init__` sets.
_SHAPE = (
    "size",
    "block_size",
    "physical_block_size",
    "max_io_bytes",
    "discard_granularity",
    "rotational",
    "read_only",
    "zone_size",
    "max_open_zones",
    "max_active_zones",
    "max_append_bytes",
)

# How long `invalidate` waits for requests in flight.
_DRAIN_SECONDS = 60.0


# Held while the extents of a disk are created. Reentrant: a signal handler may run meanwhile.
_extents_lock = threading.RLock()


class _KeptExtents:
    """Extents with a reference to the disk that owns them, since an `id()` may be reused."""

    def __init__(self, owner: BlockDevice | None = None, extents: Extents | None = None) -> None:
        self._pid = os.getpid()
        self._owner = None if owner is None else weakref.ref(owner)
        self.extents = Extents() if extents is None else extents

    def is_of(self, disk: BlockDevice) -> bool:
        return self._pid == os.getpid() and self._owner is not None and self._owner() is disk

    def __reduce__(self) -> tuple[type[_KeptExtents], tuple[()]]:
        # A copy has no owner.
        return _KeptExtents, ()


def _in_forked_child() -> None:
    """Replace the lock that a thread of the parent may have held."""
    global _extents_lock
    _extents_lock = threading.RLock()


_lifecycle.register_fork_hook(_in_forked_child)


class BlockDevice:
    """Base class of disks written in Python.

    Override `read`, and those of `write`, `flush`, `discard` and `write_zeroes` that the disk supports. Only methods
    that a subclass overrides are advertised to the kernel.

    A disk whose bytes are stored in files can leave the data to the engine: see `map`. There are five ways to handle
    requests:

    * Plain methods run on the queue threads: with ``queues=1`` one at a time, with more queues on several threads
      concurrently.
    * `start` with ``workers=N`` runs plain methods on a pool of threads, for methods that block.
    * ``async def`` methods run as tasks of an event loop: one per queue, in a thread of its own, or the caller's loop
      with `start_async`. A class may mix both kinds of methods; the plain ones must not block.
    * `handle`, which replaces the others, gets all requests of a wake-up.
    * `start` with ``pull=True`` lets the program take requests from `Device.requests`.

    A request is acknowledged when its method returns. Exceptions:

    * `OSError` fails the request with its errno, or with ``EIO`` if Linux does not know the number;
    * `NotImplementedError` fails it with ``EOPNOTSUPP``, `TimeoutError` with ``ETIMEDOUT``, `MemoryError` with
      ``ENOMEM``;
    * any other exception fails it with ``EIO`` and is logged with its traceback under the logger ``ublk``; the device
      keeps running;
    * `SystemExit` and `KeyboardInterrupt` fail it with ``EIO`` and stop the device; `Device.wait` raises them. With
      `start_async` in the main thread, `KeyboardInterrupt` ends the event loop instead, like other signals' exceptions.

    Methods return ``None`` or, like ``readinto`` and ``preadv``, the number of bytes, which must be all of them.

    Parameters
    ----------
    size:
        Capacity in bytes, a multiple of ``block_size``.
    block_size:
        Logical block size, the smallest unit of a request: a power of two from 512 to 4096.
    physical_block_size:
        Smallest unit that needs no read-modify-write; by default ``block_size``.
    max_io_bytes:
        Maximum size of a read or write: a multiple of 4096 up to 32 MiB. Each of the ``queues * depth`` requests has a
        buffer of this size, whose pages are allocated on first use.
    discard_granularity:
        Smallest unit of a discard; by default ``block_size``.
    rotational:
        Report the disk as rotational.
    read_only:
        Make the disk read-only even though it defines `write`.
    zone_size:
        Zone size in bytes, a power of two, which makes this a zoned disk; see `report_zones`. Linux 6.6.
    max_open_zones, max_active_zones:
        Limits of the zoned disk; 0 for no limit.
    max_append_bytes:
        Maximum size of a `zone_append`; by default ``max_io_bytes``.

    """

    operations: Collection[str] = (Op.READ, Op.WRITE)
    """Operations of a disk with `map`, `handle` or ``pull=True``. Otherwise the methods of the class decide."""

    def __init__(
        self,
        *,
        size: SupportsIndex,
        block_size: SupportsIndex = 512,
        physical_block_size: SupportsIndex | None = None,
        max_io_bytes: SupportsIndex = 512 << 10,
        discard_granularity: SupportsIndex | None = None,
        rotational: bool = False,
        read_only: bool = False,
        zone_size: SupportsIndex = 0,
        max_open_zones: SupportsIndex = 0,
        max_active_zones: SupportsIndex = 0,
        max_append_bytes: SupportsIndex | None = None,
    ) -> None:
        self.size: int = number("size", size, 64)
        self.block_size: int = number("block_size", block_size, 32)
        self.physical_block_size: int = (
            self.block_size if physical_block_size is None else number("physical_block_size", physical_block_size, 32)
        )
        self.max_io_bytes: int = number("max_io_bytes", max_io_bytes, 32)
        self.discard_granularity: int = (
            self.block_size if discard_granularity is None else number("discard_granularity", discard_granularity, 32)
        )
        self.rotational: bool = bool(rotational)
        self.read_only: bool = bool(read_only)
        self.zone_size: int = number("zone_size", zone_size, 32)
        self.max_open_zones: int = number("max_open_zones", max_open_zones, 32)
        self.max_active_zones: int = number("max_active_zones", max_active_zones, 32)
        self.max_append_bytes: int = (
            self.max_io_bytes if max_append_bytes is None else number("max_append_bytes", max_append_bytes, 32)
        )
        self._check_shape()

    def read(self, offset: int, buf: memoryview, /) -> MaybeAsync[int | Extent | Zeros | None]:
        """Fill ``buf`` with the disk's bytes from ``offset`` on.

        ``buf`` is the request's own memory, writable, and valid until the method returns; using the view afterwards
        raises `ValueError`. Objects that still reference the memory (a slice, a numpy array) keep it alive and never
        see another request's data. Bytes left unwritten are zeros, or `ublk.testing.POISON` under `ublk.testing`.

        Instead of filling ``buf``, the method may return an `Extent` (not a ``stable`` one) or `Zeros` that covers the
        request, and the engine reads from there. If the extent is invalidated meanwhile, the method is called again, up
        to 16 times.
        """
        raise NotImplementedError

    def write(self, offset: int, buf: memoryview, /) -> MaybeAsync[int | Extent | None]:
        """Store the bytes of ``buf`` at ``offset``.

        ``buf`` is read-only, and valid until the method returns. Without this method the disk is read-only. The method
        may return an `Extent` that covers the request, and the engine writes there; see `read`.
        """
        raise NotImplementedError

    def flush(self) -> MaybeAsync[None]:
        """Make all acknowledged writes durable.

        A disk with this method has a volatile write cache as far as the kernel is concerned: ``fsync`` calls it, and
        FUA writes are followed by a flush. Without it, writes count as durable when `write` returns.

        `os.fdatasync` reports lost writes to one of several concurrent callers only, and repeats a sync that reports
        them as ``EINTR``: use `FileSync`. For writes of the engine to an `Extent`, of this or an earlier server of the
        device, the library takes care of the rest: a flush that succeeds waits for concurrent ones, and once one has
        failed, all further flushes of the disk fail with ``EIO``.
        """
        raise NotImplementedError

    def discard(self, offset: int, length: int, /) -> MaybeAsync[None]:
        """Discard a range, whose content is undefined until it is written again."""
        raise NotImplementedError

    def write_zeroes(self, offset: int, length: int, /) -> MaybeAsync[None]:
        """Zero a range. Without this method the kernel writes pages of zeros."""
        raise NotImplementedError

    def report_zones(self, offset: int, count: int, /) -> Iterable[Zone]:
        """Return ``count`` zones in order, starting with the one at ``offset``.

        A report that contradicts itself or the disk's size fails, and the reason is logged; a device whose first report
        fails does not start.

        The disk itself enforces the rules: sequential zones are written at their write pointers (otherwise ``EIO``),
        and only so many of them may be open.
        """
        raise NotImplementedError

    def zone_append(self, offset: int, buf: memoryview, /) -> int:
        """Store ``buf`` at the write pointer of the zone at ``offset``, and return the offset on the disk."""
        raise NotImplementedError

    def zone_open(self, offset: int, /) -> None:
        """Open the zone at ``offset`` explicitly."""
        raise NotImplementedError

    def zone_close(self, offset: int, /) -> None:
        """Close the zone at ``offset``."""
        raise NotImplementedError

    def zone_finish(self, offset: int, /) -> None:
        """Finish the zone at ``offset``: mark it as full."""
        raise NotImplementedError

    def zone_reset(self, offset: int, /) -> None:
        """Reset the zone at ``offset``: discard its data."""
        raise NotImplementedError

    def zone_reset_all(self) -> None:
        """Reset all sequential zones; by default one after the other with `zone_reset`."""
        for start in range(0, self.size, self.zone_size):
            zone = next(iter(self.report_zones(start, 1)))
            if zone.condition not in (ZoneCondition.CONVENTIONAL, ZoneCondition.EMPTY):
                self.zone_reset(start)

    def handle(self, requests: Sequence[Request], /) -> None:
        """Handle all requests of a wake-up: complete or fail each of them, now or later, on any thread.

        Replaces all other methods; `operations` lists what the disk supports. A request that is dropped without an
        answer fails with ``EIO``. An exception fails all requests of the batch that are still unanswered.
        """
        raise NotImplementedError

    def map(self, op: Op, offset: int, length: int, /) -> Extent | Zeros | None:
        """Return where the bytes of a read or write are stored, so that the engine transfers them without Python.

        Called on the queue threads before `read` or `write`. The engine reads or writes the file itself, without a copy
        where the kernel supports it (Linux 6.15). If the extent is shorter than the request, this is called again for
        the rest. ``None`` passes the whole request to `read` or `write`, which may be coroutines or run on ``workers``.
        A ``stable`` extent is cached: this is not called again for requests inside it.

        The disk supports the operations that it has methods for and those in `operations`, by default writes. Without
        `flush`, data written to a file counts as durable. A file opened with ``O_DIRECT`` needs extents aligned to its
        block size.
        """
        raise NotImplementedError

    def invalidate(self, offset: int = 0, length: int | None = None, *, wait: bool = False) -> None:
        """Withdraw the extents of a range, by default of the whole disk, whether cached or in use.

        After this returns, `map` is called for every new request to the range. Earlier requests may still use the old
        extents. With ``wait`` this returns only when they have ended, so that their place in the file can be reused.
        Raises `TimeoutError` after a minute.

        A handler cannot wait (`RuntimeError`), since it might wait for a request of its own thread. A handler that has
        copied data need not wait: a client that reads before a write is acknowledged may see the old bytes. A thread
        that waits must not hold a lock that `map` or a handler needs: make `map` return ``None`` for the range, wait,
        and then lock.
        """
        length = (1 << 63) - 1 - offset if length is None else length
        if wait and threading.current_thread() in _threads:
            raise RuntimeError("a handler cannot wait for requests: they may be those of its own thread")
        if not self._extents.invalidate(offset, length, _DRAIN_SECONDS if wait else None):
            raise TimeoutError(errno.ETIMEDOUT, f"requests to {offset}+{length} are still in flight")

    @property
    def _extents(self) -> Extents:
        # Created on first use, since the `__init__` of a class may not call ours. All threads share one. A forked child
        # gets its own, in which no requests of the parent are in flight. So does a copy of the object (`copy.copy`),
        # whose bytes may be stored elsewhere: it still has the owner of the original.
        kept: _KeptExtents | None = self.__dict__.get("_kept_extents")
        if kept is None or not kept.is_of(self):
            with _extents_lock:
                # Another thread may have been first.
                kept = self.__dict__.get("_kept_extents")
                if kept is None or not kept.is_of(self):
                    kept = self.__dict__["_kept_extents"] = _KeptExtents(self, Extents())
        return kept.extents

    def _follow(self, old: BlockDevice) -> None:
        """Inherit the state of flushes from the object that served the disk before: a failed one has lost writes."""
        self.__dict__["_kept_extents"] = _KeptExtents(self, old._extents.successor())

    def start(
        self,
        *,
        queues: int = 1,
        depth: int = 128,
        id: int | None = None,
        recoverable: bool | str = False,
        hang_timeout: float | None = 30.0,
        workers: int | None = None,
        pull: bool = False,
        loop_factory: LoopFactory | None = None,
        isolated: bool = False,
        shared_memory: bool = False,
        coalesce_usecs: int = 0,
    ) -> Device:
        """Create the device, serve it, and return when its node is ready.

        Leaving the ``with`` block of the returned `Device`, or calling `Device.stop`, stops and deletes it.

        While devices are running, ``SIGTERM`` and ``SIGHUP`` raise `SystemExit` in the main thread, unless the program
        has its own handlers, so that a terminated program removes its devices. The interpreter's switch interval is
        lowered from 5 ms to 0.5 ms (`sys.setswitchinterval`), so that a thread that computes delays requests less.

        A handler may fork. If the child returns from the handler, it is ended with status 1.

        Do not use a disk in the process that serves it: a thread that waits for a disk cannot be killed, and a process
        that is killed while it waits for itself may never end. The log warns about programs that have their own disk
        open. If a handler is late while threads of the program wait for this disk, that is reported as well, and late
        requests of tasks fail, so that the threads can continue. Plain methods that wait for their own disk cannot be
        interrupted: the device stays until the machine is rebooted, unless the driver can abort the requests of a dying
        process (``ublk del --force``).

        Parameters
        ----------
        queues:
            Number of hardware queues, each with a thread. The driver creates at most one per CPU.
        depth:
            Maximum number of requests in flight per queue, 1 to 4096.
        id:
            Number N of ``/dev/ublkbN``; by default the lowest free one.
        recoverable:
            Keep the device when this process is killed or calls `Device.quiesce`; `recover` serves it again. Requests
            wait meanwhile. With ``"reissue"`` (or ``True``), requests in flight are sent again, and may be carried out
            twice; with ``"queue"`` they fail. With ``"fail-io"`` all requests fail meanwhile. Linux 6.1; 6.13 for
            ``"fail-io"``.
        hang_timeout:
            Seconds after which a handler that is still running is reported in the log with its stack, once. ``None``
            for no limit.
        workers:
            Number of threads that call plain methods instead of the queue threads, divided among the queues. At most
            ``depth`` per queue have something to do.
        pull:
            Let the program take requests from `Device.requests`. Returns before the node exists, since the kernel reads
            the disk first.
        loop_factory:
            Creates the event loops of coroutine methods, for example ``uvloop.new_event_loop``.
        isolated:
            Serve the disk from a separate process, which the program cannot delay. It gets a pickled copy of this
            object, whose class must be importable; changes to either copy (`invalidate`, for example) are not seen by
            the other. Its log records are passed to this process, unless the class's module configures logging when
            imported. It exits with the program; if it dies, `Device.wait` raises `UblkError` with ``EOWNERDEAD``.
            Scripts need ``if __name__ == "__main__":``, since the process imports them.
        shared_memory:
            Allow `Device.share_memory`. Linux 7.1; not for recoverable devices.
        coalesce_usecs:
            Coalesce requests: under load, wait up to this many microseconds (at most 10,000) and handle what has
            arrived as one batch. Reduces the work per request and adds latency to receiving it and to answers from
            workers, coroutines or files. A client that sends one request at a time is not delayed, unless the thread
            serves other devices. 20 is a good start.

        """
        options = Options(
            queues=queues,
            depth=depth,
            id=id,
            recoverable=recoverable,
            hang_timeout=hang_timeout,
            workers=workers,
            pull=pull,
            loop_factory=loop_factory,
            isolated=isolated,
            shared_memory=shared_memory,
            coalesce_usecs=coalesce_usecs,
        )
        device = Device._make(self, options)
        _start.start(device)
        return device

    async def start_async(
        self,
        *,
        queues: int = 1,
        depth: int = 128,
        id: int | None = None,
        recoverable: bool | str = False,
        hang_timeout: float | None = 30.0,
        coalesce_usecs: int = 0,
    ) -> Device:
        """Create the device and serve it on the running event loop, for classes with coroutine methods.

        Use it as ``async with await disk.start_async() as device:``, or stop it with `Device.stop_async`. The
        parameters are those of `start`.
        """
        options = Options(
            queues=queues,
            depth=depth,
            id=id,
            recoverable=recoverable,
            hang_timeout=hang_timeout,
            coalesce_usecs=coalesce_usecs,
        )
        device = Device._make(self, options)
        await _start.start_async(device)
        return device

    def _serve(self, hooks: Hooks, options: Options) -> Serving:
        """Choose how requests reach the methods."""
        return _methods.choose(self, hooks, options)

    def _check_shape(self) -> None:
        """Raise `ValueError` for an invalid shape."""
        check(self._describe())

    def _check_recovery(self) -> None:
        """Raise if the disk cannot be recovered; accepts by default."""

    def _check_size(self, size: int) -> None:
        """Raise if the disk cannot have a size; accepts by default."""

    def _describe(self) -> dict[str, Any]:
        """Return the disk's parameters."""
        missing = [name for name in _SHAPE if not hasattr(self, name)]
        if missing:
            name = type(self).__name__
            hint = " (in a dataclass, __post_init__ can do so)" if hasattr(self, "__dataclass_fields__") else ""
            text = f"{name} has no {missing[0]}: its __init__ must call super().__init__(size=...){hint}"
            raise TypeError(text)
        return {
            "size": number("size", self.size, 64),
            "block_size": number("block_size", self.block_size, 32),
            "physical_block_size": number("physical_block_size", self.physical_block_size, 32),
            "max_io_bytes": number("max_io_bytes", self.max_io_bytes, 32),
            "discard_granularity": number("discard_granularity", self.discard_granularity, 32),
            "rotational": bool(self.rotational),
            "read_only": bool(self.read_only),
            "zone_size": number("zone_size", self.zone_size, 32),
            "max_open_zones": number("max_open_zones", self.max_open_zones, 32),
            "max_active_zones": number("max_active_zones", self.max_active_zones, 32),
            "max_append_bytes": number("max_append_bytes", self.max_append_bytes, 32),
        }

    def _overridden(self, name: str) -> Callable[..., Any] | None:
        """Return the bound method if the class or the instance overrides it."""
        method = getattr(self, name, None)
        if method is None or getattr(method, "__func__", None) is getattr(BlockDevice, name):
            return None
        if not callable(method):
            raise TypeError(f"{type(self).__name__}.{name} is not callable")
        return method  # type: ignore[no-any-return]
