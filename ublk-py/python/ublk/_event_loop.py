# SPDX-License-Identifier: MIT OR Apache-2.0

"""Coroutine methods, run as tasks of an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import inspect
import os
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from contextvars import copy_context
from sys import getrefcount
from types import CoroutineType
from typing import TYPE_CHECKING, Any, NoReturn

from ublk import _lifecycle, _ublk
from ublk._requests import Op
from ublk._signals import Terminated

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from ublk._ublk import PullQueue, Request

# Maximum number of requests that are taken at once, so that other callbacks of the loop can run in between.
_AT_ONCE = 64

# In the order of `Request._call`.
_OPERATIONS = (Op.READ, Op.WRITE, Op.FLUSH, Op.DISCARD, Op.WRITE_ZEROES)

# Whether a task that was cancelled and uncancelled before it waits is cancelled when it does.
_UNCANCELLED_MUST_CANCEL = sys.version_info < (3, 13)

# How often this process was forked off by another one that had imported this module.
_forks = 0


def _stack(coroutine: Any, thread: int) -> str:
    """Return the stack of a coroutine that waits, down to the innermost one, or that runs on the given thread."""
    if getattr(coroutine, "cr_running", False) and (frame := sys._current_frames().get(thread)) is not None:
        outermost = coroutine.cr_frame
        frames = [found for found, _ in traceback.walk_stack(frame)]
        # Unless it has begun to wait meanwhile.
        if outermost in frames:
            inner = frames[: frames.index(outermost) + 1]
            return "".join(line for found in reversed(inner) for line in traceback.format_stack(found, limit=1))
    lines = []
    # What a coroutine awaits may be any object, with attributes of any kind.
    while isinstance(coroutine, CoroutineType) and coroutine.cr_frame is not None:
        lines += traceback.format_stack(coroutine.cr_frame, limit=1)
        coroutine = coroutine.cr_await
    return "".join(lines)


# Servers that have a reader in a loop.
_servers: weakref.WeakSet[LoopServer] = weakref.WeakSet()


def _in_forked_child() -> None:
    """Let a handler that returns notice that it is in a child process, and end the child if it returns to the loop."""
    global _forks
    _forks += 1
    for loop in {server._loop for server in list(_servers) if server._thread == threading.get_ident()}:
        # A loop that is closed serves nothing.
        with contextlib.suppress(RuntimeError):
            assert loop is not None
            loop.call_soon(_end_forked_child, _CONTINUED)
            # Before callbacks that are due, which may continue other handlers. Loops of other kinds run those first.
            due = getattr(loop, "_ready", None)
            if isinstance(due, deque):
                due.rotate(1)
    # Last: an exception of a signal handler repeats the rest.
    _servers.clear()


_lifecycle.register_fork_hook(_in_forked_child)


# Ways of a forked child to the requests of its parent.
_RETURNED = "returned from the handler that forked it"
_CONTINUED = "continued the event loop that serves its parent's device"


def _end_forked_child(way: str = _RETURNED) -> NoReturn:
    """End a forked child that has left a handler: the requests and the loop belong to its parent.

    So does what the loop waits with: a child that removes its readers removes those of its parent, too.
    """
    _ublk.exit_forked_child(way)


def _may_start_eagerly(loop: asyncio.AbstractEventLoop) -> bool:
    """Return whether tasks of a loop may start eagerly, unless it has a task factory: from Python 3.12 on."""
    if sys.version_info < (3, 12):
        return False
    kind = type(loop)
    return getattr(kind, "create_task", None) is asyncio.BaseEventLoop.create_task or kind.__module__ == "uvloop"


def _is_of_a_signal(exception: BaseException) -> bool:
    """Whether a signal has raised this, which came while the main thread's event loop ran a handler."""
    if not isinstance(exception, Terminated | KeyboardInterrupt):
        return False
    return threading.current_thread() is threading.main_thread()


def _raise(exception: BaseException) -> None:
    """End the event loop with an exception."""
    raise exception


def _fail_all(requests: Sequence[Request]) -> int:
    """Fail the requests that have not ended; return how many. May be called from any thread."""
    failed = 0
    for request in list(requests):
        if not request.done:
            with contextlib.suppress(ValueError):
                request.fail(errno.EIO)
                failed += 1
    return failed


class _Run:
    """A coroutine that serves requests, one after the other."""

    __slots__ = ("began", "coroutine", "left", "request", "task")

    coroutine: Coroutine[Any, Any, None]

    def __init__(self, began: float, left: list[Request]) -> None:
        # When the requests were taken.
        self.began = began
        # Requests that it has not begun, the first one last. It may share them with other runs.
        self.left = left
        # The request that it serves.
        self.request: Request | None = None
        # Unset before it has waited for the first time.
        self.task: asyncio.Task[None] | None = None

    def current(self) -> list[Request]:
        """Return the request that it serves, if there is one."""
        request = self.request
        return [] if request is None else [request]


class LoopServer:
    """Serves the requests of one queue with tasks."""

    def __init__(
        self,
        queue: PullQueue,
        methods: Mapping[str, Callable[..., Any] | None],
        report: Callable[[str, BaseException], None],
        die: Callable[[BaseException], None],
    ) -> None:
        self._queue = queue
        self._methods = tuple(methods.get(op) for op in _OPERATIONS)
        self._report = report
        self._die = die
        # The coroutines that serve requests, by a number.
        self._runs: dict[int, _Run] = {}
        self._count = 0
        # The number of the last coroutine that was begun.
        self._begun = 0
        # Requests that were taken and not begun, the first one last, and when they were taken.
        self._taken: list[Request] = []
        self._taken_at = 0.0
        self._thread = 0
        self._forks = _forks
        self._descriptor = -1
        self._ended: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._may_start_eagerly = False
        self._guard: asyncio.Task[None] | None = None
        self._attached = threading.Event()
        self._error: BaseException | None = None

    def attach(self) -> None:
        """Begin to serve on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._may_start_eagerly = _may_start_eagerly(self._loop)
        self._thread = threading.get_ident()
        _servers.add(self)
        self._ended = asyncio.Event()
        # A loop has one reader for each descriptor.
        self._descriptor = os.dup(self._queue.fileno())
        self._loop.add_reader(self._descriptor, self._ready)
        self._guard = self._loop.create_task(self._watch_the_end())
        self._attached.set()

    def run(self, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None) -> None:
        """Serve on a new loop in this thread until the queue ends."""
        try:
            with asyncio.Runner(loop_factory=loop_factory) as runner:
                runner.run(self._serve_all())
        except BaseException as error:
            self._error = error
            if self._attached.is_set():
                self._die(error)
        finally:
            # If the loop ended in another way, nothing serves the queue any more.
            self._queue.close()
            self._attached.set()

    def wait_attached(self) -> None:
        """Wait until the thread of `run` serves the queue. Raises the exception that prevented it."""
        self._attached.wait()
        if self._error is not None:
            raise self._error

    async def _serve_all(self) -> None:
        self.attach()
        assert self._guard is not None
        await self._guard

    async def _watch_the_end(self) -> None:
        """Wait until the queue ends. If the loop ends before, end the device."""
        assert self._ended is not None
        try:
            await self._ended.wait()
        except BaseException as exception:
            if self._forks != _forks:
                if isinstance(exception, GeneratorExit):
                    # The child has dropped its copy of the loop, and goes its own way.
                    raise
                _end_forked_child(_CONTINUED)
            # A loop that ends cancels all tasks.
            self._queue.close()
            self._fail_unbegun()
            self._forget_descriptor()
            self._die(RuntimeError("the event loop that serves the device has ended"))
            raise

    def _forget_descriptor(self) -> None:
        assert self._loop is not None
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
        _servers.discard(self)

    def waiting(self) -> list[tuple[int, float, str]]:
        """Return the requests that tasks serve: a number, the age of the request in seconds, and the stack."""
        found = []
        for number, run in list(self._runs.items()):
            found.append((number, time.monotonic() - run.began, _stack(run.coroutine, self._thread)))
        return found

    def is_current(self) -> bool:
        """Whether this is the thread that runs the loop."""
        try:
            return self._loop is not None and asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    def is_current_task(self) -> bool:
        """Whether this is a task that serves a request."""
        task = asyncio.current_task(self._loop) if self.is_current() else None
        return task is not None and any(task.get_coro() is run.coroutine for run in list(self._runs.values()))

    def fail_late(self, seconds: float) -> int:
        """Fail the requests that are older than so many seconds, and cancel their tasks; return how many."""
        failed, now = 0, time.monotonic()
        taken = self._taken
        if now - self._taken_at >= seconds:
            failed += _fail_all(taken)
        for run in list(self._runs.values()):
            if now - run.began < seconds:
                continue
            # Requests of `taken` may be younger.
            late = _fail_all([*([] if run.left is taken else run.left), *run.current()])
            failed += late
            if late and run.task is not None and self._loop is not None:
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(run.task.cancel)
        return failed

    def cancel(self) -> None:
        """Cancel the tasks that serve requests. May be called from any thread."""
        if self._loop is not None:
            # A loop that is closed has cancelled them.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._cancel_tasks)

    def _cancel_tasks(self) -> None:
        for run in list(self._runs.values()):
            if run.task is not None:
                run.task.cancel()

    def abandon(self) -> None:
        """Fail the requests of the queue if the loop is not running any more."""
        if self._loop is None or self._loop.is_running():
            return
        self._queue.close()
        self._fail_unbegun()
        for run in list(self._runs.values()):
            _fail_all([*run.left, *run.current()])

    def _fail_unbegun(self) -> None:
        """Fail the requests that an exception prevented from being served."""
        _fail_all(self._taken)
        for run in list(self._runs.values()):
            _fail_all(run.left)
            if run.task is not None and inspect.getcoroutinestate(run.coroutine) == inspect.CORO_CREATED:
                # Else it would call the handler for a request that is over.
                run.task.cancel()

    def _ready(self) -> None:
        assert self._loop is not None
        if self._forks != _forks:
            _end_forked_child(_CONTINUED)
        try:
            self._serve_new()
        except BaseException:
            # A signal handler has raised, which the loop logs, or passes on to a program that may run it again. Nothing
            # else might call this for what is left.
            self._loop.call_soon(self._ready)
            raise

    def _serve_new(self) -> None:
        """Take requests and begin to serve them."""
        assert self._loop is not None
        if not self._taken:
            # Runs that wait refer to the old list.
            self._taken = []
        self._thread = threading.get_ident()
        # Before they are in the list, which the watchdog reads.
        self._taken_at = time.monotonic()
        # A signal handler may raise at any place: from here on, requests are in this list or in a run.
        if not self._queue.take_into(_AT_ONCE, self._taken):
            self._forget_descriptor()
            assert self._ended is not None
            self._ended.set()
        if len(self._taken) > 1:
            # One wake-up of the queue's thread for all that do not wait.
            self._queue.corked(self._begin_taken)
        else:
            self._begin_taken()

    def _begin_taken(self) -> None:
        """Begin to serve the requests that were taken."""
        assert self._loop is not None
        began = self._taken_at
        eager = self._may_start_eagerly and self._loop.get_task_factory() is None
        if eager:
            # Creating a task takes most of the time of a request that does not wait. So one task serves requests in
            # turn until one of them waits, and another task serves those after it.
            while self._taken or self._begun < self._count:
                if self._begun == self._count:
                    self._register(began, self._taken)
                self._begin(self._begun + 1, eager)
                self._begun += 1
            return
        # Register all of them before the first one runs, which may delay the others.
        while self._taken:
            self._register(began, self._taken[-1:])
            self._taken.pop()
        while self._begun < self._count:
            # Again, if a signal handler raises before the count is up to date.
            self._begin(self._begun + 1, eager)
            self._begun += 1

    def _register(self, began: float, left: list[Request]) -> None:
        """Make a coroutine that serves the requests of a list."""
        run = _Run(began, left)
        run.coroutine = self._serve(run)
        self._runs[self._count + 1] = run
        self._count += 1

    def _begin(self, number: int, eager: bool) -> None:
        """Run a coroutine in a task."""
        run = self._runs.get(number)
        if run is None:
            return
        try:
            if run.task is None:
                run.task = self._task(run.coroutine, eager)
        except BaseException as exception:
            # The loop's task factory failed, or a signal handler raised.
            run.task = self._task_of(run.coroutine)
            if run.task is None:
                del self._runs[number]
                if inspect.getcoroutinestate(run.coroutine) == inspect.CORO_CREATED and run.left:
                    # Nothing has begun it, and nothing will.
                    run.request = run.left.pop()
                run.coroutine.close()
                self._fail(run.request, exception)
                return
            # The task was made, and serves the request.
            self._fail(None, exception)
        if run.task.done():
            del self._runs[number]
        else:
            run.task.add_done_callback(functools.partial(self._done, number))

    def _task_of(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
        """Return the task that runs a coroutine, if there is one that has not ended."""
        return next((task for task in asyncio.all_tasks(self._loop) if task.get_coro() is coroutine), None)

    def _done(self, number: int, _task: asyncio.Task[None]) -> None:
        self._runs.pop(number, None)

    def _task(self, coroutine: Coroutine[Any, Any, None], eager: bool) -> asyncio.Task[None]:
        assert self._loop is not None
        if eager and sys.version_info >= (3, 12):
            # For a request that does not wait, scheduling the task would take most of the time.
            return asyncio.Task(coroutine, loop=self._loop, eager_start=True)
        return self._loop.create_task(coroutine)

    async def _serve(self, run: _Run) -> None:
        """Serve the requests of a list until it is empty, or a handler has changed the task."""
        forks = self._forks
        try:
            if forks != _forks:
                _end_forked_child(_CONTINUED)
            methods, left = self._methods, run.left
            task: Any = None
            if len(left) > 1:
                task, context = asyncio.current_task(), copy_context()
                cancelling = task.cancelling
                references, weak_references = getrefcount(task), weakref.getweakrefcount(task)
            first = True
            while True:
                request = None
                # Everything is inside: a signal handler may raise at any place.
                try:
                    run.request = None
                    if not left:
                        return
                    if not first:
                        try:
                            if (
                                task is None
                                # Through a reference that was kept, the task could be cancelled later.
                                or getrefcount(task) != references
                                or weakref.getweakrefcount(task) != weak_references
                                or task._callbacks
                                or cancelling()
                                or (_UNCANCELLED_MUST_CANCEL and task._must_cancel)
                                or copy_context() != context
                            ):
                                return
                        except Exception:
                            # Values of context variables are compared, which may be objects of any kind.
                            return
                    first = False
                    run.request = request = left.pop()
                    ended = False
                    while not ended:
                        # Unless the request has failed because it waited for its turn for too long.
                        returned = request._call(methods)
                        # A class may have plain methods, too.
                        if returned is not None and (type(returned) is CoroutineType or inspect.isawaitable(returned)):
                            returned = await returned
                        if forks != _forks:
                            _end_forked_child()
                        # Repeated if the returned extent was invalidated meanwhile.
                        ended = request._finish(returned)
                except BaseException as exception:
                    if forks != _forks:
                        if isinstance(exception, GeneratorExit):
                            # The child has dropped its copy of the coroutine. The request is its parent's.
                            return
                        _end_forked_child()
                    if isinstance(exception, asyncio.CancelledError | GeneratorExit):
                        # The task was cancelled, or the coroutine closed.
                        if request is not None and not request.done:
                            request.fail(errno.ECANCELED)
                        if isinstance(exception, GeneratorExit):
                            return
                        raise
                    if request is None or not request._raise(exception):
                        self._fail(request, exception)
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as exception:
            # A signal handler has raised between two requests, or while one failed.
            if run.request is not None and not run.request.done:
                run.request.fail()
            self._fail(None, exception)

    def _fail(self, request: Request | None, exception: BaseException) -> None:
        """Fail a request for an exception that is no errno, and pass that on."""
        if request is None or _is_of_a_signal(exception):
            # It is the program's. Raised by the task, it would be logged as one that nothing has retrieved, too.
            assert self._loop is not None
            self._loop.call_soon(_raise, exception)
        else:
            self._report(request.op, exception)
        if request is not None and not request.done:
            request.fail()
