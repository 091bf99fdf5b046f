# SPDX-License-Identifier: MIT OR Apache-2.0

"""The methods of a block device: their checks, and the way of serving that they need."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

from ublk._requests import Op
from ublk._serving import BatchServing, LoopServing, MethodServing, PullServing, WorkerServing
from ublk._zones import reporter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ublk._block_device import BlockDevice
    from ublk._options import Options
    from ublk._serving import Handlers, Hooks, Serving

# Methods of zoned disks.
_ZONES = ("zone_append", "zone_open", "zone_close", "zone_finish", "zone_reset")


def _zone_methods(target: BlockDevice) -> Handlers:
    """Return the methods of a zoned disk; none for another disk."""
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


# Arguments that the methods are called with.
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
# Names of the methods in other libraries.
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
    """Raise `TypeError` for methods with wrong parameters, and warn of those that look misspelt."""
    name = type(target).__name__
    for method, arguments in _CALLS.items():
        function = target._overridden(method)
        if function is None:
            continue
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):
            # A function written in C, for example.
            continue
        try:
            signature.bind(*arguments)
        except TypeError as error:
            call = f"{method}({', '.join(arguments)})"
            raise TypeError(f"{name}.{method}{signature} cannot be called as {call}: {error}") from None
    for found in _unknown_methods(type(target)):
        import difflib

        near = difflib.get_close_matches(found, _CALLS, n=1, cutoff=0.85)
        meant = _OTHER_NAMES.get(found) or (near[0] if near else None)
        if meant is not None and target._overridden(meant) is None:
            text = f"{name}.{found} is never called by ublk: is it meant to be {meant}()?"
            warnings.warn(text, UserWarning, stacklevel=6)


def _unknown_methods(kind: type[BlockDevice]) -> Iterator[str]:
    """Yield the public methods of a class that ublk does not know."""
    root = next(base for base in reversed(kind.__mro__) if "_overridden" in vars(base))
    known = vars(root)
    for base in kind.__mro__[: kind.__mro__.index(root)]:
        # Methods of mixins have other purposes.
        if not issubclass(base, root):
            continue
        for member, value in vars(base).items():
            if member not in known and not member.startswith("_") and inspect.isroutine(value):
                yield member


def _is_coroutine(method: Callable[..., Any] | None) -> bool:
    """Whether a method is a coroutine function, or an object whose ``__call__`` is one."""
    call = inspect.getattr_static(type(method), "__call__", None)
    return inspect.iscoroutinefunction(method) or inspect.iscoroutinefunction(call)


def choose(target: BlockDevice, hooks: Hooks, options: Options) -> Serving:
    """Choose how a block device is served, by its methods and the options."""
    name = type(target).__name__
    workers, loop_factory = options.workers, options.loop_factory
    _check_methods(target)
    methods: Handlers = {op: target._overridden(op) for op in Op}
    written = [op for op, method in methods.items() if method is not None]
    handle = target._overridden("handle")
    coroutines = [op for op in written if _is_coroutine(methods[op])]
    if (options.pull or handle is not None) and target.zone_size:
        raise ValueError(f"{name} is zoned: only plain methods can serve it")
    if options.pull:
        if written or handle is not None or target._overridden("map") is not None:
            raise TypeError(f"{name} has handler methods, which are never called with pull=True")
        if workers is not None or loop_factory is not None:
            raise ValueError("pull=True cannot be combined with workers or an event loop: the program handles requests")
        return PullServing(name, {"extents": target._extents}, _declared(target), hooks)
    if handle is not None:
        others = [*written, *(["map"] if target._overridden("map") is not None else [])]
        if others:
            raise TypeError(f"{name} defines both handle() and {others[0]}(): define only one of them")
        if _is_coroutine(handle):
            raise TypeError(f"{name}.handle must not be a coroutine function; use pull=True and `async for` instead")
        if workers is not None or loop_factory is not None:
            raise ValueError("handle() runs on the queue threads and cannot be combined with workers or an event loop")
        return BatchServing(name, {"handle": handle}, _declared(target), hooks)
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
        return LoopServing(name, handlers, operations, hooks, loop_factory)
    if workers is not None:
        return WorkerServing(name, handlers, operations, hooks, workers)
    return MethodServing(name, handlers, operations, hooks)


def _declared(target: BlockDevice) -> list[str]:
    """Return the operations that the class declares, and reads."""
    try:
        return sorted({Op(operation) for operation in target.operations} | {Op.READ})
    except ValueError as error:
        raise ValueError(f"{type(target).__name__}.operations: {error}; valid operations: {', '.join(Op)}") from None
