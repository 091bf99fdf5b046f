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
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from ublk._requests import Op
from ublk._signals import Terminated

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from ublk._ublk import PullQueue, Request

# Maximum number of requests that are taken at once, so that other callbacks of the loop can run in between.
_AT_ONCE = 64


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


def _end_forked_child() -> None:
    """End a forked child that has returned from a handler: the request and the loop belong to its parent."""
    text = "ublk: a child process returned from the handler that forked it; exiting with status 1"
    print(text, file=sys.stderr, flush=True)
    os._exit(1)


def _starts_eagerly(loop: asyncio.AbstractEventLoop) -> bool:
    """Return whether tasks may start eagerly: from Python 3.12 on, if the loop has no task factory."""
    if sys.version_info < (3, 12):
        return False
    kind = type(loop)
    known = getattr(kind, "create_task", None) is asyncio.BaseEventLoop.create_task or kind.__module__ == "uvloop"
    return known and loop.get_task_factory() is None


def _is_of_a_signal(exception: BaseException) -> bool:
    """Whether a signal has raised this, which came while the main thread's event loop ran a handler."""
    if not isinstance(exception, Terminated | KeyboardInterrupt):
        return False
    return threading.current_thread() is threading.main_thread()


def _raise(exception: BaseException) -> None:
    """End the event loop with an exception."""
    raise exception


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
        self._methods = methods
        self._report = report
        self._die = die
        # Requests in progress, by a number: when it was taken, the request, and the coroutine that serves it.
        self._serving: dict[int, tuple[float, Request, Coroutine[Any, Any, None]]] = {}
        # The tasks of those coroutines, once they have begun to wait.
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._count = 0
        # Requests that were taken and are not in `_serving` yet: a signal handler may raise at any place.
        self._hand: list[weakref.ref[Request]] = []
        self._thread = 0
        self._owner = os.getpid()
        self._descriptor = -1
        self._ended: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._guard: asyncio.Task[None] | None = None
        self._attached = threading.Event()
        self._error: BaseException | None = None

    def attach(self) -> None:
        """Begin to serve on the running loop."""
        self._loop = asyncio.get_running_loop()
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
        except BaseException:
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

    def waiting(self) -> list[tuple[int, float, str]]:
        """Return the tasks that serve requests: a number, the age of the request in seconds, and the stack."""
        found = []
        for number, (began, _request, coroutine) in list(self._serving.items()):
            found.append((number, time.monotonic() - began, _stack(coroutine, self._thread)))
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
        return task is not None and any(task.get_coro() is served[2] for served in self._serving.values())

    def fail_late(self, seconds: float) -> int:
        """Fail the requests that are older than so many seconds, and cancel their tasks; return how many."""
        failed = 0
        for number, (began, request, _coroutine) in list(self._serving.items()):
            if time.monotonic() - began < seconds or request.done:
                continue
            with contextlib.suppress(ValueError):
                request.fail(errno.EIO)
                failed += 1
            task = self._tasks.get(number)
            if task is not None and self._loop is not None:
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(task.cancel)
        return failed

    def cancel(self) -> None:
        """Cancel the tasks that serve requests. May be called from any thread."""
        if self._loop is not None:
            # A loop that is closed has cancelled them.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._cancel_tasks)

    def _cancel_tasks(self) -> None:
        for task in list(self._tasks.values()):
            task.cancel()

    def abandon(self) -> None:
        """Fail the requests of the queue if the loop is not running any more."""
        if self._loop is None or self._loop.is_running():
            return
        self._queue.close()
        self._fail_unbegun()
        for _began, request, _coroutine in list(self._serving.values()):
            with contextlib.suppress(ValueError):
                request.fail()

    def _fail_unbegun(self) -> None:
        """Fail the requests that an exception prevented from being served."""
        taken = [request for reference in self._hand if (request := reference()) is not None]
        for number, (_began, request, coroutine) in list(self._serving.items()):
            if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
                taken.append(request)
                if (task := self._tasks.get(number)) is not None:
                    # Else it would call the handler for a request that is over.
                    task.cancel()
        for request in taken:
            with contextlib.suppress(ValueError):
                request.fail()

    def _ready(self) -> None:
        assert self._loop is not None
        batch = self._queue.take(_AT_ONCE, self._hand)
        if batch is None:
            self._forget_descriptor()
            assert self._ended is not None
            self._ended.set()
            return
        began, first = time.monotonic(), self._count + 1
        # Register all of them before the first one runs, which may delay the others.
        for request in batch:
            self._count += 1
            self._serving[self._count] = (began, request, self._serve(request))
        self._hand.clear()
        self._thread = threading.get_ident()
        eager = _starts_eagerly(self._loop)
        for number in range(first, self._count + 1):
            _began, request, coroutine = self._serving[number]
            try:
                task = self._task(coroutine, eager)
            except BaseException as exception:
                # The loop's task factory failed.
                del self._serving[number]
                coroutine.close()
                self._fail(request, exception)
                continue
            if task.done():
                del self._serving[number]
            else:
                self._tasks[number] = task
                task.add_done_callback(functools.partial(self._done, number))

    def _done(self, number: int, _task: asyncio.Task[None]) -> None:
        del self._serving[number], self._tasks[number]

    def _task(self, coroutine: Coroutine[Any, Any, None], eager: bool) -> asyncio.Task[None]:
        assert self._loop is not None
        if eager and sys.version_info >= (3, 12):
            # For a request that does not wait, scheduling the task would take most of the time.
            return asyncio.Task(coroutine, loop=self._loop, eager_start=True)
        return self._loop.create_task(coroutine)

    async def _serve(self, request: Request) -> None:
        method = self._methods[request.op]
        try:
            if method is None:
                # An operation that the class declares, because `map` is meant to handle all of its requests.
                raise NotImplementedError
            ended = False
            while not ended:
                if request.op is Op.READ or request.op is Op.WRITE:
                    returned = method(request.offset, request.buffer)
                elif request.op is Op.FLUSH:
                    returned = method()
                else:
                    returned = method(request.offset, request.length)
                # A class may have plain methods, too.
                if isinstance(returned, CoroutineType) or inspect.isawaitable(returned):
                    returned = await returned
                if os.getpid() != self._owner:
                    _end_forked_child()
                # Repeated if the returned extent was invalidated meanwhile.
                ended = request._finish(returned)
        except asyncio.CancelledError:
            if not request.done:
                request.fail(errno.ECANCELED)
            raise
        except BaseException as exception:
            if not request._raise(exception):
                self._fail(request, exception)

    def _fail(self, request: Request, exception: BaseException) -> None:
        """Fail a request for an exception that is no errno, and pass that on."""
        if _is_of_a_signal(exception):
            # It is the program's. Raised by the task, it would be logged as one that nothing has retrieved, too.
            assert self._loop is not None
            self._loop.call_soon(_raise, exception)
        else:
            self._report(request.op, exception)
        if not request.done:
            request.fail()
