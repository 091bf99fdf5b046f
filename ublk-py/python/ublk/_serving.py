# SPDX-License-Identifier: MIT OR Apache-2.0

"""How a device's requests get to Python: by what the class has, and how it is started."""

from __future__ import annotations

import difflib
import functools
import inspect
import warnings
from typing import TYPE_CHECKING, Any

from ublk import _ublk
from ublk._event_loop import LoopServer
from ublk._requests import Op, Requests
from ublk._threads import spawn
from ublk._zones import reporter

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import TypeAlias

    from ublk._block_device import BlockDevice
    from ublk._isolated import RemoteDevice

    Native: TypeAlias = _ublk.NativeDevice | RemoteDevice
    Handlers = dict[str, Any]
    Report = Callable[[str, BaseException], None]
    LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def _ignore(operation: str, exception: BaseException) -> None:
    """Discard a report."""


def _die(exception: BaseException) -> None:
    """No-op default for `die`."""


class Serving:
    """Requests come to methods, or to ``handle``, on the threads of their queues."""

    needs_python = True

    def __init__(self, handlers: Handlers, operations: Iterable[str], report: Report) -> None:
        # With `map`, which returns where bytes are stored, before everything else.
        self.style = "mapped" if "map" in handlers else "methods"
        self.operations = sorted(operations)
        self.handlers: Handlers | _ublk.NativeTarget = {**handlers, "report": report}
        self._report = report
        # Ends the device, because nothing serves it any more; the device puts it in place.
        self.die: Callable[[BaseException], None] = _die

    def add(
        self,
        description: Mapping[str, Any],
        options: Mapping[str, Any],
        driver: _ublk.FakeDriver | None,
        made: list[Native],
    ) -> None:
        """Make the device, and append it to ``made``."""
        _ublk.add(description, self.handlers, options, spawn, driver, made)

    def recover(
        self, description: Mapping[str, Any], id: int, driver: _ublk.FakeDriver | None, made: list[Native]
    ) -> None:
        """Serve a device whose last server is gone, and append it to ``made``."""
        _ublk.recover(description, self.handlers, id, spawn, driver, made)

    def begin(self, native: _ublk.NativeDevice) -> None:
        """Start what takes the requests, before the first one comes."""

    def release(self) -> None:
        """Let go of the block device, whose device is no more."""
        self.handlers = {}
        self._report = _ignore
        self.die = _die

    def tasks(self) -> list[tuple[int, float, str]]:
        """Return the requests that tasks have: a number, seconds, and the task's stack."""
        return []

    def fail_late(self, seconds: float) -> int:
        """Fail the requests that have been served for so many seconds, if that is possible; return how many."""
        return 0

    def check_task(self) -> None:
        """Raise in a task that serves a request of the device."""

    def check_loop(self) -> None:
        """Raise on the event loop that serves the device."""

    def cancel(self) -> None:
        """Cancel tasks that serve requests of the device."""

    def abandon(self) -> None:
        """Fail requests that will not be taken any more; called before the device stops."""


class NativeServing(Serving):
    """The engine serves requests by itself."""

    needs_python = False

    def __init__(self, target: _ublk.NativeTarget, operations: Iterable[str], report: Report) -> None:
        super().__init__({}, operations, report)
        self.style = "native"
        self.handlers = target


class BatchServing(Serving):
    """All requests of a wake-up go to ``handle`` at once."""

    def __init__(self, handlers: Handlers, operations: Iterable[str], report: Report) -> None:
        super().__init__(handlers, operations, report)
        self.style = "batch"


def _pulled(style: str) -> str:
    """Name the style in which others than the queues' threads take what is to be handled."""
    return "mapped-pull" if style == "mapped" else "pull"


class WorkerServing(Serving):
    """A pool of threads calls the methods, so that they may wait."""

    def __init__(self, handlers: Handlers, operations: Iterable[str], report: Report, workers: int) -> None:
        super().__init__(handlers, operations, report)
        self.style = _pulled(self.style)
        self._methods = {**handlers, "report": report}
        self._workers = workers

    def begin(self, native: _ublk.NativeDevice) -> None:
        """Divide the threads among the queues."""
        queues = native.pull_queues[: native.queues]
        for number in range(max(self._workers, len(queues))):
            worker = _ublk.Worker(queues[number % len(queues)], self._methods)
            spawn(f"ublk{native.id}w{number}", worker.run)


class LoopServing(Serving):
    """Coroutine methods run as tasks: on a loop of each queue's own, or on the caller's."""

    def __init__(
        self, handlers: Handlers, operations: Iterable[str], report: Report, loop_factory: LoopFactory | None
    ) -> None:
        super().__init__(handlers, operations, report)
        self.style = _pulled(self.style)
        self._methods = handlers
        self._loop_factory = loop_factory
        self._servers: list[LoopServer] = []
        self.is_here = False

    def begin(self, native: _ublk.NativeDevice) -> None:
        """Attach to the running loop, or start threads with their own."""
        for number, queue in enumerate(native.pull_queues[: native.queues]):
            server = LoopServer(queue, self._methods, self._report, self.die)
            self._servers.append(server)
            if self.is_here:
                server.attach()
            else:
                spawn(f"ublk{native.id}loop{number}", functools.partial(server.run, self._loop_factory))
                server.wait_attached()

    def tasks(self) -> list[tuple[int, float, str]]:
        """Ask the loops."""
        # Numbers of different loops must differ.
        found = []
        for n, server in enumerate(self._servers):
            found += [(number * len(self._servers) + n, seconds, stack) for number, seconds, stack in server.waiting()]
        return found

    def fail_late(self, seconds: float) -> int:
        """Fail the requests that tasks have had for so many seconds, and cancel the tasks; return how many."""
        return sum(server.fail_late(seconds) for server in self._servers)

    def check_task(self) -> None:
        """Raise in a task that serves a request of the device."""
        if any(server.is_current_task() for server in self._servers):
            text = "a handler cannot wait for its own device to stop; raise SystemExit, or stop it in another task"
            raise RuntimeError(text)

    def check_loop(self) -> None:
        """Raise on the event loop that serves the device."""
        if any(server.is_current() for server in self._servers):
            raise RuntimeError("this event loop serves the device: use `await device.stop_async()`, or `async with`")

    def cancel(self) -> None:
        """Cancel tasks that serve requests of the device."""
        for server in self._servers:
            server.cancel()

    def abandon(self) -> None:
        """Fail requests whose loop is closed."""
        for server in self._servers:
            server.abandon()


class PullServing(Serving):
    """The program takes requests by itself."""

    requests: Requests

    def __init__(self, handlers: Handlers, operations: Iterable[str], report: Report) -> None:
        super().__init__(handlers, operations, report)
        self.style = "pull"

    def begin(self, native: _ublk.NativeDevice) -> None:
        """Have the queues ready to be iterated over."""

    def abandon(self) -> None:
        """Fail requests that are not taken."""
        # A start may have failed before there are any.
        if hasattr(self, "requests"):
            self.requests.abandon()


# Methods of zoned disks.
_ZONES = ("zone_append", "zone_open", "zone_close", "zone_finish", "zone_reset")


def _zone_methods(target: BlockDevice) -> Handlers:
    """Find the methods of a zoned disk; none of another."""
    name = type(target).__name__
    found: Handlers = {method: target._overridden(method) for method in _ZONES}
    report = target._overridden("report_zones")
    if not target.zone_size:
        written = [method for method, function in {**found, "report_zones": report}.items() if function is not None]
        if written:
            raise TypeError(f"{name} has {written[0]}(), but no zone_size")
        return {}
    if report is None or found["zone_reset"] is None:
        raise TypeError(f"{name} has a zone_size but lacks the methods report_zones and zone_reset")
    if any(map(_is_coroutine, (report, *found.values()))):
        raise TypeError(f"{name}: zone methods must be plain methods, not coroutines")
    return {**found, "zone_reset_all": target.zone_reset_all, "report_zones": reporter(target, report)}


# How the methods are called.
_CALLS = {
    "read": ("offset", "buf"),
    "write": ("offset", "buf"),
    "flush": (),
    "discard": ("offset", "length"),
    "write_zeroes": ("offset", "length"),
    "handle": ("requests",),
    "map": ("op", "offset", "length"),
    "report_zones": ("offset", "count"),
    "zone_append": ("offset", "buf"),
    "zone_open": ("offset",),
    "zone_close": ("offset",),
    "zone_finish": ("offset",),
    "zone_reset": ("offset",),
    "zone_reset_all": (),
}
# What other libraries call them.
_OTHER_NAMES = {
    "pread": "read",
    "pwrite": "write",
    "fsync": "flush",
    "fdatasync": "flush",
    "sync": "flush",
    "trim": "discard",
    "unmap": "discard",
    "zero": "write_zeroes",
    "zeroes": "write_zeroes",
    "write_same": "write_zeroes",
}


def _check_methods(target: BlockDevice) -> None:
    """Raise for methods that cannot be called as they will be, and warn of those that look like misspelt ones."""
    name = type(target).__name__
    for method, arguments in _CALLS.items():
        function = target._overridden(method)
        if function is None:
            continue
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):
            # Of a function in C, say.
            continue
        try:
            signature.bind(*arguments)
        except TypeError as error:
            call = f"{method}({', '.join(arguments)})"
            raise TypeError(f"{name}.{method}{signature} cannot be called as {call}: {error}") from None
    for found in _unknown_methods(type(target)):
        near = difflib.get_close_matches(found, _CALLS, n=1, cutoff=0.85)
        meant = _OTHER_NAMES.get(found) or (near[0] if near else None)
        if meant is not None and target._overridden(meant) is None:
            text = f"{name}.{found} is never called by ublk: is it meant to be {meant}()?"
            warnings.warn(text, UserWarning, stacklevel=6)


def _unknown_methods(kind: type[BlockDevice]) -> Iterator[str]:
    """Find methods of a class that ublk does not know."""
    root = next(base for base in reversed(kind.__mro__) if "_overridden" in vars(base))
    known = vars(root)
    for base in kind.__mro__[: kind.__mro__.index(root)]:
        # What is mixed in is for something else.
        if not issubclass(base, root):
            continue
        for member, value in vars(base).items():
            if member not in known and not member.startswith("_") and inspect.isroutine(value):
                yield member


def _is_coroutine(method: Callable[..., Any] | None) -> bool:
    """Whether a call of this gives a coroutine: of a function, or of an object whose ``__call__`` is one."""
    call = inspect.getattr_static(type(method), "__call__", None)
    return inspect.iscoroutinefunction(method) or inspect.iscoroutinefunction(call)


def choose(
    target: BlockDevice,
    report: Report,
    *,
    workers: int | None = None,
    pull: bool = False,
    loop_factory: LoopFactory | None = None,
) -> Serving:
    """Find out how a block device wants to be served."""
    name = type(target).__name__
    _check_methods(target)
    methods: Handlers = {op: target._overridden(op) for op in Op}
    written = [op for op, method in methods.items() if method is not None]
    handle = target._overridden("handle")
    coroutines = [op for op in written if _is_coroutine(methods[op])]
    if (pull or handle is not None) and target.zone_size:
        raise ValueError(f"{name} is zoned: only plain methods can serve it")
    if pull:
        if written or handle is not None or target._overridden("map") is not None:
            raise TypeError(f"{name} has handler methods, which are never called with pull=True")
        if workers is not None or loop_factory is not None:
            raise ValueError("pull=True cannot be combined with workers or an event loop: the program handles requests")
        return PullServing({"extents": target._extents}, _declared(target), report)
    if handle is not None:
        others = [*written, *(["map"] if target._overridden("map") is not None else [])]
        if others:
            raise TypeError(f"{name} defines both handle() and {others[0]}(): define only one of them")
        if _is_coroutine(handle):
            raise TypeError(f"{name}.handle must not be a coroutine function; use pull=True and `async for` instead")
        if workers is not None or loop_factory is not None:
            raise ValueError("handle() runs on the queue threads and cannot be combined with workers or an event loop")
        return BatchServing({"handle": handle}, _declared(target), report)
    mapping = target._overridden("map")
    zones = _zone_methods(target)
    if zones and (coroutines or mapping is not None):
        raise ValueError(f"{name} is zoned: only plain methods can serve it, not map()")
    if methods["read"] is None and mapping is None:
        raise TypeError(f"{name} has no read(self, offset, buf) method")
    if workers is not None and coroutines:
        raise ValueError(f"{name}.{coroutines[0]} is a coroutine function, which workers cannot call")
    if loop_factory is not None and not coroutines:
        raise ValueError(f"{name} has no coroutine methods for an event loop")
    handlers: Handlers = {**methods, "extents": target._extents}
    if zones:
        handlers["zones"] = zones
    if mapping is not None:
        if _is_coroutine(mapping):
            raise TypeError(f"{name}.map must not be a coroutine function: it is called on the queue threads")
        handlers |= {"read": target.read, "map": mapping}
        written = [*_declared(target), *written]
    operations = sorted(set(written))
    if coroutines:
        return LoopServing(handlers, operations, report, loop_factory)
    if workers is not None:
        return WorkerServing(handlers, operations, report, workers)
    return Serving(handlers, operations, report)


def _declared(target: BlockDevice) -> list[str]:
    """What a device says that it can do."""
    try:
        return sorted({Op(operation) for operation in target.operations} | {Op.READ})
    except ValueError as error:
        raise ValueError(f"{type(target).__name__}.operations: {error}; valid operations: {', '.join(Op)}") from None
