# SPDX-License-Identifier: MIT OR Apache-2.0

"""Coroutine methods, run as tasks of an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import os
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

from ublk._requests import Op

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ublk._ublk import PullQueue, Request

# Requests that are taken in one go, so that other callbacks of the loop get their turn.
_AT_ONCE = 64


def _stack(task: asyncio.Task[None]) -> str:
    """Tell what a task waits for, down to the innermost coroutine."""
    lines = []
    coroutine: Any = task.get_coro()
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        lines += traceback.format_stack(frame, limit=1)
        coroutine = coroutine.cr_await
    return "".join(lines)


class LoopServer:
    """Serves one queue's requests by tasks."""

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
        # Each with its number, when it began, and its request.
        self._tasks: dict[asyncio.Task[None], tuple[int, float, Request]] = {}
        self._count = 0
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
        # A loop knows one reader for each descriptor.
        self._descriptor = os.dup(self._queue.fileno())
        self._loop.add_reader(self._descriptor, self._ready)
        self._guard = self._loop.create_task(self._watch_the_end())
        self._attached.set()

    def run(self, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None) -> None:
        """Serve on a loop of this thread's own until the queue ends."""
        try:
            with asyncio.Runner(loop_factory=loop_factory) as runner:
                runner.run(self._serve_all())
        except BaseException as error:
            self._error = error
            if self._attached.is_set():
                self._die(error)
        finally:
            # If that ended in another way, nobody serves the queue any more.
            self._queue.close()
            self._attached.set()

    def wait_attached(self) -> None:
        """Wait until the thread of `run` serves the queue. Raises what keeps it from that."""
        self._attached.wait()
        if self._error is not None:
            raise self._error

    async def _serve_all(self) -> None:
        self.attach()
        assert self._guard is not None
        await self._guard

    async def _watch_the_end(self) -> None:
        """Wait for the queue's end. If the loop ends before, so does the device."""
        assert self._ended is not None
        try:
            await self._ended.wait()
        except BaseException:
            # As all tasks are when a loop ends.
            self._queue.close()
            self._die(RuntimeError("the event loop that served the device has ended"))
            raise

    def waiting(self) -> list[tuple[int, float, str]]:
        """Tell what tasks are at: a number, the seconds that each has had a request, and its stack."""
        found = []
        for task, (number, began, _request) in list(self._tasks.items()):
            found.append((number, time.monotonic() - began, _stack(task)))
        return found

    def is_current(self) -> bool:
        """Whether this is the thread that runs the loop."""
        try:
            return self._loop is not None and asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    def abandon(self) -> None:
        """Fail the queue's requests if the loop that served them runs no more."""
        if self._loop is None or self._loop.is_running():
            return
        self._queue.close()
        for _number, _began, request in list(self._tasks.values()):
            with contextlib.suppress(ValueError):
                request.fail()

    def _ready(self) -> None:
        assert self._loop is not None
        batch = self._queue.take(_AT_ONCE)
        if batch is None:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            assert self._ended is not None
            self._ended.set()
            return
        for request in batch:
            task = self._loop.create_task(self._serve(request))
            self._count += 1
            self._tasks[task] = (self._count, time.monotonic(), request)
            task.add_done_callback(self._tasks.pop)

    async def _serve(self, request: Request) -> None:
        method = self._methods[request.op]
        try:
            if method is None:
                # What a class declares, for its `map` to do all of.
                raise NotImplementedError
            ended = False
            while not ended:
                if request.op is Op.READ or request.op is Op.WRITE:
                    returned = method(request.offset, request.buffer)
                elif request.op is Op.FLUSH:
                    returned = method()
                else:
                    returned = method(request.offset, request.length)
                # A class may have methods of both kinds.
                if inspect.isawaitable(returned):
                    returned = await returned
                # Again, if what it has returned was invalidated meanwhile.
                ended = request._finish(returned)
        except asyncio.CancelledError:
            if not request.done:
                request.fail(errno.ECANCELED)
            raise
        except BaseException as exception:
            if not request._raise(exception):
                self._report(request.op, exception)
                if not request.done:
                    request.fail()
