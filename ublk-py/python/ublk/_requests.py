# SPDX-License-Identifier: MIT OR Apache-2.0

"""Requests as objects, and iterators over the requests of a device."""

from __future__ import annotations

import contextlib
import enum
import itertools
import logging
import os
import select
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING

from ublk import _signals
from ublk._log import Limiter, also, log
from ublk._running_loop import event_loop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from ublk._ublk import PullQueue, Request

_dropped = Limiter()

# How long a stop waits for requests that an iteration had when it was left.
_GRACE_SECONDS = 1.0


class Op(enum.StrEnum):
    """Operation of a request. Equal to its name: ``Op.READ == "read"``."""

    READ = "read"
    """Fill the buffer with data of the disk."""
    WRITE = "write"
    """Store the buffer."""
    FLUSH = "flush"
    """Make everything acknowledged so far durable."""
    DISCARD = "discard"
    """The range's content is no longer needed."""
    WRITE_ZEROES = "write_zeroes"
    """Zero the range."""


def dropped(what: str) -> None:
    """Log that a request was dropped without an answer; called where its last reference is released."""
    frame = sys._getframe().f_back
    if frame is None or frame.f_code.co_filename == threading.__file__:
        place = "when its handler had returned"
    else:
        place = f"at {frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
    left_out = _dropped.admit(place)
    if left_out is not None:
        text = "request %s was dropped %s without an answer, and fails with EIO: call complete() or fail()%s"
        log(logging.WARNING, text, what, place, also(left_out))


def _unfinished(hand: list[weakref.ref[Request]]) -> list[Request]:
    return [request for reference in hand if (request := reference()) is not None and not request.done]


class Requests:
    """Iterator over the requests of a device, for ``for`` and ``async for``.

    Several threads and tasks may iterate concurrently: each request goes to one of them. The iteration ends with the
    device. When the last iteration is left early, nothing serves the device any more, and further requests fail with
    ``EIO``.
    """

    def __init__(self, queues: Sequence[PullQueue], error: Callable[[], BaseException | None]) -> None:
        self._queues = tuple(queues)
        self._error = error
        # The thread of each iteration in progress.
        self._consumers: dict[object, int] = {}
        # Requests that each iteration has taken from a queue and not ended, also after it was left.
        self._hands: dict[object, list[weakref.ref[Request]]] = {}

    def __iter__(self) -> Iterator[Request]:
        """Wait for requests in this thread. In the main thread, Ctrl-C interrupts the wait."""
        with self._consumer() as (descriptors, hand), _signals.wakeup_fd() as signalled:
            poller = select.poll()
            if signalled is not None:
                poller.register(signalled, select.POLLIN)
            for descriptor in descriptors.values():
                poller.register(descriptor, select.POLLIN)
            waiting = list(descriptors)
            while waiting:
                batch, ended = self._take(waiting, hand)
                yield from batch
                for queue in ended:
                    poller.unregister(descriptors[queue])
                if not batch and not ended:
                    poller.poll()
                    if signalled is not None:
                        _signals.drain(signalled)
        self._raise()

    async def __aiter__(self) -> AsyncIterator[Request]:
        """Wait for requests on the running event loop."""
        loop = event_loop("async for")
        import asyncio

        ready = asyncio.Event()
        with self._consumer() as (descriptors, hand), _signals.waking(loop):
            waiting = list(descriptors)
            while waiting:
                batch, ended = self._take(waiting, hand)
                for request in batch:
                    yield request
                if batch or ended:
                    continue
                # The readers are removed after each wait: the loop would call them all the time while the body waits.
                ready.clear()
                for queue in waiting:
                    loop.add_reader(descriptors[queue], ready.set)
                try:
                    await ready.wait()
                finally:
                    for queue in waiting:
                        loop.remove_reader(descriptors[queue])
        self._raise()

    def _take(
        self, waiting: list[PullQueue], hand: list[weakref.ref[Request]]
    ) -> tuple[list[Request], list[PullQueue]]:
        """Take a request from the first queue that has one, and move that queue to the end of the list.

        Remove queues that have ended from the list, and return them, too.
        """
        ended = []
        # The body has ended the previous request, or passed it on.
        hand.clear()
        for queue in list(waiting):
            batch = queue.take(1, hand)
            if batch is None:
                waiting.remove(queue)
                ended.append(queue)
            elif batch:
                waiting.remove(queue)
                waiting.append(queue)
                return batch, ended
        return [], ended

    @contextlib.contextmanager
    def _consumer(self) -> Iterator[tuple[dict[PullQueue, int], list[weakref.ref[Request]]]]:
        """Register an iteration, with its own descriptors of the queues and a list for the requests that it takes.

        The descriptors stay valid after the queues end, and a loop has one reader for each descriptor.
        """
        for over in self._hands.keys() - self._consumers.keys():
            # An iteration that was left with a request, which has ended since.
            if not _unfinished(self._hands.get(over, [])):
                self._hands.pop(over, None)
        token = object()
        hand: list[weakref.ref[Request]] = []
        self._consumers[token] = threading.get_ident()
        self._hands[token] = hand
        descriptors: dict[PullQueue, int] = {}
        try:
            for queue in self._queues:
                number = queue.fileno()
                if number >= 0:
                    descriptors[queue] = os.dup(number)
            yield descriptors, hand
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)
            if not _unfinished(hand):
                self._hands.pop(token, None)
            del self._consumers[token]
            if not self._consumers:
                self.close()

    def close(self) -> None:
        """Fail all requests that have not been taken, and all later ones. Iterations end."""
        for queue in self._queues:
            queue.close()

    def _abandon(self) -> None:
        """Fail the requests that iterations were left with, and close the queues unless another thread iterates."""
        # The traceback of an exception may keep a request of an iteration that was left, so that it is not dropped. Or
        # the body may have passed it to another thread.
        left = [hand for token, hand in list(self._hands.items()) if token not in self._consumers]
        deadline = time.monotonic() + _GRACE_SECONDS
        for request in itertools.chain(*map(_unfinished, left)):
            while not request.done and time.monotonic() < deadline:
                time.sleep(0.01)
            if not request.done:
                dropped(repr(request).strip("<>"))
                with contextlib.suppress(ValueError):
                    request.fail()
        living = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        if living.isdisjoint(list(self._consumers.values())):
            self.close()

    def _raise(self) -> None:
        error = self._error()
        if error is not None:
            raise error
