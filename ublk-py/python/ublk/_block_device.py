# SPDX-License-Identifier: MIT OR Apache-2.0

"""The class that users derive from."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, SupportsIndex

from ublk._numbers import number
from ublk._requests import Op
from ublk._threads import threads as _threads
from ublk._ublk import Extents, check
from ublk._zones import ZoneCondition

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
    from typing import TypeAlias, TypeVar

    from ublk._device import Device
    from ublk._serving import Report, Serving
    from ublk._ublk import Extent, FakeDriver, Request, Zeros
    from ublk._zones import Zone

    Result = TypeVar("Result")
    # What a method returns, or a coroutine method in the end.
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

# How long requests that are under way may take to end.
_DRAIN_SECONDS = 60.0


class _KeptExtents:
    """Extents, and the object whose they are: not its number, which is another's when it is gone."""

    def __init__(self, owner: BlockDevice | None = None, extents: Extents | None = None) -> None:
        self._pid = os.getpid()
        self._owner = None if owner is None else weakref.ref(owner)
        self.extents = Extents() if extents is None else extents

    def is_of(self, disk: BlockDevice) -> bool:
        return self._pid == os.getpid() and self._owner is not None and self._owner() is disk

    def __reduce__(self) -> tuple[type[_KeptExtents], tuple[()]]:
        # Nobody's, in a copy.
        return _KeptExtents, ()


class BlockDevice:
    """A disk whose content is Python's business.

    Override `read`, and of `write`, `flush`, `discard` and `write_zeroes` those that the disk has. Only
    what a subclass overrides is advertised to the kernel.

    A disk whose bytes lie in files need not touch them: see `map`. There are four ways to be served:

    * Plain methods run on the threads that serve the queues: with ``queues=1`` one at a time, with more of them on
      several threads at once. `start` with ``workers=N`` runs them on a pool of threads, for methods that wait.
    * ``async def`` methods run as tasks of an event loop: one for each queue, in a thread of its own, or the
      caller's, with `start_async`. A class may have methods of both kinds; the plain ones must not wait.
    * `handle`, in place of the others, gets all requests of a wake-up.
    * `start` with ``pull=True`` leaves it to the program to take requests (`Device.requests`).

    A request is acknowledged when its method returns. Exceptions:

    * `OSError` fails the request with its errno, or with ``EIO`` if Linux has no such number;
    * `NotImplementedError` with ``EOPNOTSUPP``, `TimeoutError` with ``ETIMEDOUT``, `MemoryError` with
      ``ENOMEM``;
    * any other exception is logged with its traceback under the logger ``ublk`` and becomes ``EIO``; the
      device lives on;
    * `SystemExit` and `KeyboardInterrupt` fail the request with ``EIO`` and stop the device; whoever
      waits for it gets the exception.

    Methods return ``None`` or, as ``readinto`` and ``preadv`` do, the number of bytes, which must be all
    of them.

    Parameters
    ----------
    size:
        Capacity in bytes, a multiple of ``block_size``.
    block_size:
        Logical block size: the smallest unit of a request; a power of two from 512 to 4096.
    physical_block_size:
        The smallest unit that needs no read-modify-write; ``block_size`` by default.
    max_io_bytes:
        Longest read or write; a multiple of 4096 up to 32 MiB. Each of ``queues * depth`` requests has a
        buffer of this size, whose pages are taken when they are first used.
    discard_granularity:
        Smallest unit of a discard; ``block_size`` by default.
    rotational:
        Report the disk as one with moving parts.
    read_only:
        Refuse writes even though `write` is there.
    zone_size:
        Make the disk a zoned one, with zones of so many bytes, a power of two: with the methods `report_zones`,
        `zone_reset` and others. Linux 6.6.
    max_open_zones, max_active_zones:
        Their limits; 0 for none.
    max_append_bytes:
        Longest `zone_append`; ``max_io_bytes`` by default.

    """

    operations: Collection[str] = (Op.READ, Op.WRITE)
    """What a disk with `map` or `handle`, or one whose requests are pulled, can do; of others it is what methods they
    have."""

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

        ``buf`` is the request's own memory, writable, and lent for the time of the call: used
        afterwards it raises `ValueError`. Objects that hold on to it (a numpy array over it, a slice)
        stay valid memory of their own and never see another request. Fill all of it: what is left
        untouched is zeros, and `testing.POISON` in `ublk.testing`.

        In place of that it may return an `Extent` or `Zeros` that covers the request, and is not ``stable``: the engine
        reads from there then. If that is invalidated in the meantime, this is called again, up to 16 times.
        """
        raise NotImplementedError

    def write(self, offset: int, buf: memoryview, /) -> MaybeAsync[int | Extent | None]:
        """Store the bytes of ``buf`` at ``offset``.

        ``buf`` is read-only and lent as in `read`. Without this method the disk is read-only. It may return an `Extent`
        that covers the request: the engine writes to that then, or calls this again, as with `read`.
        """
        raise NotImplementedError

    def flush(self) -> MaybeAsync[None]:
        """Make everything durable whose `write` has returned.

        A disk with this method has a volatile write cache in the kernel's eyes: ``fsync`` ends here, and
        writes that must be durable at once are followed by a flush. Without it, writes count as durable
        when `write` returns.

        With several threads, `os.fdatasync` of one descriptor reports lost writes to one flush only, and the others
        succeed; and it repeats a sync that reports them as ``EINTR``. Use `FileSync`. If the engine has written to an
        `Extent`, the library sees to the other flushes: one that succeeds waits for those beside it, and once one has
        failed, all flushes of the object fail with ``EIO``. So it is
        for a disk with `map` that was recovered, whose last server may have written to extents.
        """
        raise NotImplementedError

    def discard(self, offset: int, length: int, /) -> MaybeAsync[None]:
        """Forget a range; it may read as anything until it is written again."""
        raise NotImplementedError

    def write_zeroes(self, offset: int, length: int, /) -> MaybeAsync[None]:
        """Make a range read as zeros. Without this method the kernel writes pages of zeros."""
        raise NotImplementedError

    def report_zones(self, offset: int, count: int, /) -> Iterable[Zone]:
        """Give the zones of a zoned disk from the one at ``offset`` on, ``count`` of them, in order.

        A report that contradicts itself or the disk's size fails with the reason in the log; a device whose first
        report fails does not start.

        A zoned disk keeps the rules itself: that sequential zones are written at their write pointers (else ``EIO``),
        and how many of them may be open.
        """
        raise NotImplementedError

    def zone_append(self, offset: int, buf: memoryview, /) -> int:
        """Store ``buf`` at the write pointer of the zone at ``offset``, and return the disk's offset where that is."""
        raise NotImplementedError

    def zone_open(self, offset: int, /) -> None:
        """Open the zone at ``offset`` explicitly."""
        raise NotImplementedError

    def zone_close(self, offset: int, /) -> None:
        """Close the zone at ``offset``."""
        raise NotImplementedError

    def zone_finish(self, offset: int, /) -> None:
        """Make the zone at ``offset`` full."""
        raise NotImplementedError

    def zone_reset(self, offset: int, /) -> None:
        """Make the zone at ``offset`` empty."""
        raise NotImplementedError

    def zone_reset_all(self) -> None:
        """Make all sequential zones empty; by default one after the other, by `zone_reset`."""
        for start in range(0, self.size, self.zone_size):
            zone = next(iter(self.report_zones(start, 1)))
            if zone.condition not in (ZoneCondition.CONVENTIONAL, ZoneCondition.EMPTY):
                self.zone_reset(start)

    def handle(self, requests: Sequence[Request], /) -> None:
        """Take all requests of a wake-up, and see to it that each of them ends, now or later, on any thread.

        In place of all other methods; `operations` says what the disk can do. A request that is dropped without an
        end fails with ``EIO``. An exception fails all requests of the batch that have not ended.
        """
        raise NotImplementedError

    def map(self, op: Op, offset: int, length: int, /) -> Extent | Zeros | None:
        """Say where the bytes of a read or write lie, so that they never pass through Python.

        Called for each, before `read` or `write`, on the threads of the queues. The engine then reads or writes the
        file itself, without a copy where the kernel can (Linux 6.15). An extent that is shorter than what was asked
        for makes the engine ask again for the rest; ``None`` leaves the whole request to `read` or `write`, which may
        be coroutines, or run on ``workers``. An extent that is ``stable`` is kept: Python is not asked again for what
        lies inside it.

        The disk can do what it has methods for, and what `operations` says: writes, by default. `flush` is still its
        own: without one, what was written to a file counts as durable. A file that is opened with ``O_DIRECT`` needs
        extents that begin at a multiple of its block size.
        """
        raise NotImplementedError

    def invalidate(self, offset: int = 0, length: int | None = None, *, wait: bool = False) -> None:
        """Take back what `map` or a handler has said of a range, by default of the whole disk, kept or not.

        Once this has returned, Python is asked for every request that comes to the range. Requests that came before may
        still be under way on the old extents. With ``wait`` they are not: this returns when they have ended, and the
        place where they were can be used for something else. A handler cannot wait (`RuntimeError`), because the
        requests may be its own thread's; nor is there a need to, if it has just made a copy: who reads before a write
        was acknowledged may see the old bytes. For the same reason, whoever waits must not hold a lock that `map` or a
        handler needs: let `map` answer ``None`` for the range, wait, and take the lock then. Raises `TimeoutError`
        after a minute.
        """
        length = (1 << 63) - 1 - offset if length is None else length
        if wait and threading.current_thread() in _threads:
            raise RuntimeError("a handler cannot wait for requests: they may be those of its own thread")
        if not self._extents.invalidate(offset, length, _DRAIN_SECONDS if wait else None):
            raise TimeoutError(errno.ETIMEDOUT, f"requests to {offset}+{length} are still under way")

    @property
    def _extents(self) -> Extents:
        # One for all threads, whichever comes first; and not from `__init__`, for classes whose own does not call it.
        # A forked child has others: requests of its parent would be under way in it for ever. So has a copy of the
        # object (`copy.copy`), whose bytes may be stored elsewhere: it has the owner of what it was copied from.
        kept: _KeptExtents = self.__dict__.setdefault("_kept_extents", _KeptExtents(self, Extents()))
        if not kept.is_of(self):
            kept = self.__dict__["_kept_extents"] = _KeptExtents(self, Extents())
        return kept.extents

    def _follow(self, old: BlockDevice) -> None:
        """Remember flushes of the object that served the disk before: one that has failed has lost writes."""
        self.__dict__["_kept_extents"] = _KeptExtents(self, old._extents.successor())

    def start(
        self,
        *,
        queues: int = 1,
        depth: int = 128,
        id: int | None = None,
        recoverable: bool | str = False,
        hang_after: float | None = 30.0,
        workers: int | None = None,
        pull: bool = False,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
        isolated: bool = False,
        shared_memory: bool = False,
        coalesce_usecs: int = 0,
        _driver: FakeDriver | None = None,
    ) -> Device:
        """Make the device and serve it; return when its node can be used.

        Leaving the returned `Device`'s ``with`` block, or its ``stop``, ends it.

        ``queues`` is how many threads share the work (the driver makes no more queues than there are
        CPUs), ``depth`` how many requests each queue holds, 1 to 4096, and ``id`` the number N of
        ``/dev/ublkbN``, by default the lowest free one.

        A ``recoverable`` device outlives a process that is killed, or that calls `Device.quiesce`: its disk stays
        mounted, and `recover` serves it again. In the meantime requests wait, and with ``"reissue"``, which ``True``
        stands for, so do those that were under way, which may be carried out twice; with ``"queue"`` those fail;
        with ``"fail-io"`` all fail. Linux 6.1, 6.13 for ``"fail-io"``.

        A handler that runs for longer than ``hang_after`` seconds is reported, once, in the log with its stack.

        A handler may fork. The child must not return from the handler: it is ended with status 1 if it does.

        A program may use its own disk in threads that do not serve it, but had better not: a thread that waits for a
        disk cannot be killed, and a process that is killed while it waits for itself may never end. The log warns of
        programs that have their own disk open. If a handler is late and threads of the program wait for this disk
        meanwhile, that is reported as well, and requests of tasks that are late fail, so that the threads can go on.
        Plain methods that wait for their own disk cannot be helped: the device stays until the machine is restarted, or
        its driver has a way to abort the requests of a process that is dying (`ublk del --force`).

        ``workers`` is how many threads call plain methods, divided among the queues, in place of the queues' own
        threads: up to ``depth`` of them for each queue have something to do. ``loop_factory`` makes the event
        loops of coroutine methods (``uvloop.new_event_loop``, say). With ``pull`` the program takes requests
        by itself; `start` returns before the node is there then, because the kernel reads the disk first.

        An ``isolated`` device is served by a process of its own, which nothing that the program does can hold up. It
        gets a copy of the block device, by pickling: its class has to be importable, and what becomes of the copy is
        not seen here, nor what is done to the original (`invalidate`, say) there. The returned `Device` does all the
        same; its log comes here, too, unless the class's module sets up logging by itself when it is imported. The
        process ends with the program, and if it dies, `Device.wait` raises `UblkError` with ``EOWNERDEAD``. A script
        that starts such devices does so under ``if __name__ == "__main__":``, because the process imports it.

        With ``shared_memory`` the device can have memory in common with its clients: `Device.share_memory`. Linux 7.1;
        not for recoverable devices.

        With ``coalesce_usecs``, up to 10,000, requests gather for so many microseconds while several are under way:
        the queue's thread sleeps instead of being woken up for each. That is less work per request, and up to so much
        more latency for each step: to be seen, and to be answered by workers, coroutines or files. A client that
        sends one request at a time does not wait, unless the thread has other devices. Some 20 are a beginning.

        While devices run, threads of the program that compute give the interpreter to others every 0.5 ms
        (`sys.setswitchinterval`; by default 5 ms, which is what each request would take then).

        While devices run, ``SIGTERM`` and ``SIGHUP`` raise `SystemExit` in the main thread, unless the
        program has handlers of its own, so that a killed program removes its devices.
        """
        from ublk._device import Device

        device = Device._make(
            self,
            queues,
            depth,
            id,
            recoverable=recoverable,
            hang_after=hang_after,
            workers=workers,
            pull=pull,
            loop_factory=loop_factory,
            isolated=isolated,
            shared_memory=shared_memory,
            coalesce_usecs=coalesce_usecs,
        )
        device._start(_driver)
        return device

    async def start_async(
        self,
        *,
        queues: int = 1,
        depth: int = 128,
        id: int | None = None,
        recoverable: bool | str = False,
        hang_after: float | None = 30.0,
        coalesce_usecs: int = 0,
        _driver: FakeDriver | None = None,
    ) -> Device:
        """Make the device and serve it by tasks of the running event loop; for classes with coroutine methods.

        ``async with await disk.start_async() as device:`` stops it in the end; so does `Device.stop_async`. The
        arguments are those of `start`.
        """
        from ublk._device import Device

        device = Device._make(
            self, queues, depth, id, recoverable=recoverable, hang_after=hang_after, coalesce_usecs=coalesce_usecs
        )
        await device._start_async(_driver)
        return device

    def _serve(
        self,
        report: Report,
        *,
        workers: int | None,
        pull: bool,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None,
    ) -> Serving:
        """Choose how requests get to the methods."""
        from ublk import _serving

        return _serving.choose(self, report, workers=workers, pull=pull, loop_factory=loop_factory)

    def _check_shape(self) -> None:
        """Raise `ValueError` for a shape that no disk can have."""
        served = {"kind": "", "operations": [], "style": "", "coalesce_usecs": 0}
        check({**self._describe(), **served})

    def _check_recovery(self) -> None:
        """Refuse to be the server after another; the disk's own business, here."""

    def _check_size(self, size: int) -> None:
        """Refuse a size that the disk cannot have; its own business, here."""

    def _describe(self) -> dict[str, Any]:
        """Tell the disk's shape."""
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
        """Return the bound method if the class or the instance has one of its own."""
        method = getattr(self, name, None)
        if method is None or getattr(method, "__func__", None) is getattr(BlockDevice, name):
            return None
        if not callable(method):
            raise TypeError(f"{type(self).__name__}.{name} is not callable")
        return method  # type: ignore[no-any-return]
