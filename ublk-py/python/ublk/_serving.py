# SPDX-License-Identifier: MIT OR Apache-2.0

"""The ways in which requests reach Python, one class for each."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ublk import _ublk
from ublk._requests import Requests
from ublk._threads import spawn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import TypeAlias

    from ublk._event_loop import LoopServer
    from ublk._isolated import RemoteDevice
    from ublk._options import LoopFactory, Options

    Native: TypeAlias = _ublk.NativeDevice | RemoteDevice
    Handlers = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Hooks:
    """The functions of a device that its way of serving calls."""

    report: Callable[[str, BaseException], None]
    """Takes the name of an operation and an exception of its handler that is not an errno."""
    die: Callable[[BaseException], None]
    """Ends the device, because nothing serves it any more."""
    exception: Callable[[], BaseException | None]
    """Returns the exception that ended the device, if any."""


_NO_HOOKS = Hooks(lambda _operation, _exception: None, lambda _exception: None, lambda: None)


class Serving:
    """Base class of the ways.

    The binding reads ``kind``, ``operations``, ``handlers`` and ``is_pulled``.
    """

    needs_python = True
    # Whether requests are taken from queues, by other threads than those of the engine.
    is_pulled = False
    # Whether `start` returns before the device is live, because the program handles the requests that go before that.
    goes_live_later = False
    # Whether the watchdog of this process looks for hanging handlers.
    is_watched = True

    def __init__(self, kind: str, handlers: Handlers, operations: Iterable[str], hooks: Hooks) -> None:
        self.kind = kind
        self.operations = sorted(operations)
        self.handlers: Handlers | _ublk.NativeTarget = {**handlers, "report": hooks.report}
        self._hooks = hooks

    def add(
        self, shape: Mapping[str, Any], options: Options, driver: _ublk.FakeDriver | None, made: list[Native]
    ) -> None:
        """Create the device, and append it to ``made``."""
        _ublk.add(shape, self, options, spawn, driver, made)

    def recover(
        self, shape: Mapping[str, Any], options: Options, driver: _ublk.FakeDriver | None, made: list[Native]
    ) -> None:
        """Serve the device ``options.id``, which has lost its server, and append it to ``made``."""
        _ublk.recover(shape, self, options, spawn, driver, made)

    def begin(self, native: Any) -> None:
        """Start what takes the requests, before the first one arrives."""

    def release(self) -> None:
        """Drop the references to the block device and its device, which has ended."""
        self.handlers = {}
        self._hooks = _NO_HOOKS

    def use_running_loop(self) -> None:
        """Serve on the running event loop. Raises `TypeError` without coroutine methods."""
        raise TypeError(f"{self.kind} has no coroutine methods: use start()")

    def check_isolated(self) -> None:
        """Raise `ValueError` if another process cannot serve in this way."""

    @property
    def requests(self) -> Requests:
        """Iterator over the requests. Raises `TypeError` unless the program takes them."""
        raise TypeError("the device was not started with pull=True")

    def tasks(self) -> list[tuple[int, float, str]]:
        """Return the requests that tasks serve: a number, seconds, and the stack of the task."""
        return []

    def fail_late(self, seconds: float) -> int:
        """Fail the requests that have been served for so many seconds, if that is possible; return how many."""
        return 0

    def check_task(self) -> None:
        """Raise `RuntimeError` in a task that serves a request of the device."""

    def check_loop(self) -> None:
        """Raise `RuntimeError` on the event loop that serves the device."""

    def cancel(self) -> None:
        """Cancel tasks that serve requests of the device."""

    def abandon(self) -> None:
        """Fail requests that nothing will take any more; called before the device stops."""


class MethodServing(Serving):
    """Calls methods on the threads of the queues."""


class BatchServing(Serving):
    """Passes all requests of a wake-up to ``handle``, on the threads of the queues."""


class NativeServing(Serving):
    """Leaves all requests to the engine."""

    needs_python = False

    def __init__(self, kind: str, target: _ublk.NativeTarget, operations: Iterable[str], hooks: Hooks) -> None:
        super().__init__(kind, {}, operations, hooks)
        self.handlers = target

    def check_isolated(self) -> None:
        """Raise: no Python code is involved."""
        raise ValueError(f"{self.kind} is a native disk: there is nothing to isolate")


class WorkerServing(Serving):
    """Calls methods on a pool of threads, so that they may block."""

    is_pulled = True

    def __init__(self, kind: str, handlers: Handlers, operations: Iterable[str], hooks: Hooks, workers: int) -> None:
        super().__init__(kind, handlers, operations, hooks)
        self._methods = {**handlers, "report": hooks.report}
        self._workers = workers

    def begin(self, native: _ublk.NativeDevice) -> None:
        """Divide the threads among the queues."""
        queues = native.pull_queues[: native.queues]
        for number in range(max(self._workers, len(queues))):
            worker = _ublk.Worker(queues[number % len(queues)], self._methods)
            spawn(f"ublk{native.id}w{number}", worker.run)


class LoopServing(Serving):
    """Runs coroutine methods as tasks: on an event loop for each queue, or on the caller's loop."""

    is_pulled = True

    def __init__(
        self,
        kind: str,
        handlers: Handlers,
        operations: Iterable[str],
        hooks: Hooks,
        loop_factory: LoopFactory | None,
    ) -> None:
        super().__init__(kind, handlers, operations, hooks)
        self._methods = handlers
        self._loop_factory = loop_factory
        self._servers: list[LoopServer] = []
        self._is_on_running_loop = False

    def use_running_loop(self) -> None:
        """Serve on the running event loop."""
        self._is_on_running_loop = True

    def begin(self, native: _ublk.NativeDevice) -> None:
        """Attach to the running loop, or start threads with their own."""
        # Not with the module: it imports asyncio.
        from ublk._event_loop import LoopServer

        for number, queue in enumerate(native.pull_queues[: native.queues]):
            server = LoopServer(queue, self._methods, self._hooks.report, self._hooks.die)
            self._servers.append(server)
            if self._is_on_running_loop:
                server.attach()
            else:
                spawn(f"ublk{native.id}loop{number}", functools.partial(server.run, self._loop_factory))
                server.wait_attached()

    def tasks(self) -> list[tuple[int, float, str]]:
        """Return the requests that tasks of all loops serve."""
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
    """Lets the program take the requests."""

    is_pulled = True
    goes_live_later = True

    def __init__(self, kind: str, handlers: Handlers, operations: Iterable[str], hooks: Hooks) -> None:
        super().__init__(kind, handlers, operations, hooks)
        self._requests: Requests | None = None

    def begin(self, native: _ublk.NativeDevice) -> None:
        """Make the queues available to iterations."""
        self._requests = Requests(native.pull_queues, self._hooks.exception)

    @property
    def requests(self) -> Requests:
        """Iterator over the requests."""
        assert self._requests is not None
        return self._requests

    def check_isolated(self) -> None:
        """Raise: the program that takes the requests is this process."""
        raise ValueError("isolated=True cannot be combined with pull=True")

    def abandon(self) -> None:
        """Fail requests that are not taken."""
        # A start may have failed before there are any.
        if self._requests is not None:
            self._requests._abandon()
