# SPDX-License-Identifier: MIT OR Apache-2.0

"""Questions to the process that serves an isolated device, and its answers."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import queue
import select
import signal
import socket
import threading
import time
import weakref
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from ublk._isolated_server import Answer

# Questions that end the device.
ENDS = ("stop", "leave")
# Number of a message before the first answer, with the number of a device that was created.
MADE = -1
# Interval at which a wait checks whether it was expedited, in seconds.
_LOOK_SECONDS = 0.1
# Limit of a wait for an answer after that.
EXPEDITED_SECONDS = 5.0
# What surely fits into a pipe that has room.
_CHUNK = 32 << 10


class _Question:
    def __init__(self, number: int, text: str, arguments: tuple[object, ...], begin_by: float = math.inf) -> None:
        self.number = number
        self.text = text
        self.arguments = arguments
        # A time of the clock that all processes share. What the process reads later, it refuses.
        self.begin_by = begin_by
        self.answer: Answer | None = None
        self.answered = threading.Event()


class Questions:
    """Sends questions and receives answers, on its own thread.

    Any number of threads may wait for answers at the same time, and so may a signal handler that interrupts a wait.
    """

    def __init__(self, control: Connection, pid: int, payload: list[bytes]) -> None:
        self._control = control
        self._payload = payload
        # Whether the process may have everything that it needs for a device.
        self.is_given = False
        self._numbers = itertools.count(1)
        # `SimpleQueue.put` is reentrant, for signal handlers.
        self._queue: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()
        self._first = _Question(0, "", ())
        self._waiting = {0: self._first}
        self._is_over = False
        self.is_expedited = False
        # Number of the device that the process has created, before it is live.
        self.made: int | None = None
        # The final report about the device; complete when the end of the process is noticed.
        self.last: dict[str, Any] = {}
        # The pipe does not close with the process if a child of it still has the other end open.
        self.running = os.pidfd_open(pid)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        for descriptor in (self.running, self._wake):
            weakref.finalize(self, os.close, descriptor).atexit = False
        self._thread = threading.Thread(target=self._run, name="ublk-questions", daemon=True)
        self._thread.start()

    def ask(self, text: str, *arguments: object, seconds: float, begin: float | None = None) -> Answer:
        """Return the answer. Raises `EOFError` if the process ends first, `TimeoutError` after so many seconds.

        The process refuses to begin after ``begin`` seconds, by default ``seconds``.
        """
        begin_by = time.monotonic() + (seconds if begin is None else begin)
        question = _Question(next(self._numbers), text, arguments, begin_by)
        self._put(question)
        return self._wait(question, seconds)

    def wait_for_start(self, seconds: float) -> Answer:
        """Return the first answer, which the process sends once it serves the device. Raises like `ask`."""
        return self._wait(self._first, seconds)

    def post(self, text: str) -> None:
        """Send a message without an answer. May be called by a signal handler."""
        self._put(_Question(-1, text, ()))

    def close(self) -> None:
        """Close the sending side, upon which the process ends. Answers are still received."""
        self._put(None)

    def join(self, seconds: float) -> None:
        """Wait until everything is received that a process sent before it ended."""
        self._thread.join(seconds)

    def _put(self, question: _Question | None) -> None:
        self._queue.put(question)
        os.eventfd_write(self._wake, 1)

    def _wait(self, question: _Question, seconds: float) -> Answer:
        deadline = time.monotonic() + seconds
        while not question.answered.wait(min(_LOOK_SECONDS, max(0.0, deadline - time.monotonic()))):
            if self._is_over:
                break
            if self.is_expedited:
                deadline = min(deadline, time.monotonic() + EXPEDITED_SECONDS)
            if time.monotonic() >= deadline:
                raise TimeoutError
        if question.answer is None:
            raise EOFError
        return question.answer

    def _run(self) -> None:
        # The program may die of it by default.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPIPE])
        try:
            self._send_payload()
            # Messages that a process sent before it ended are still received.
            while (ready := wait([self._control, self._wake, self.running])) != [self.running]:
                if self._control in ready:
                    self._receive(self._control.recv())
                if self._wake in ready:
                    self._send()
        except (EOFError, OSError):
            pass
        finally:
            self._is_over = True
            self._control.close()
            for question in self._waiting.values():
                question.answered.set()

    def _send_payload(self) -> None:
        """Send what `receive_part` takes. The process may end, or be suspended, at any point of that."""
        parts, self._payload = self._payload, []
        with contextlib.suppress(OSError):
            for part in parts:
                view = memoryview(part)
                for start in range(0, len(part), _CHUNK):
                    if not self._has_room():
                        return
                    self._control.send_bytes(view[start : start + _CHUNK])
                self.is_given = part is parts[-1]
                self._control.send_bytes(b"")

    def _has_room(self) -> bool:
        """Wait until a message can be sent at once, and receive meanwhile; return False if the process has ended."""
        poller = select.poll()
        poller.register(self._control.fileno(), select.POLLIN | select.POLLOUT)
        poller.register(self.running, select.POLLIN)
        while True:
            ready = dict(poller.poll())
            events = ready.get(self._control.fileno(), 0)
            if events & select.POLLOUT:
                return True
            if events & select.POLLIN:
                self._receive(self._control.recv())
            elif ready:
                return False

    def _receive(self, answer: Answer) -> None:
        if answer.number == MADE:
            self.made = answer.value
        # Also for a question whose wait timed out or was interrupted.
        question = self._waiting.pop(answer.number, None)
        if question is not None:
            if question.text in ENDS and answer.value is not None:
                self.last = answer.value
            question.answer = answer
            question.answered.set()

    def _send(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        with contextlib.suppress(queue.Empty):
            while True:
                question = self._queue.get_nowait()
                if question is None:
                    half = socket.socket(fileno=os.dup(self._control.fileno()))
                    with half, contextlib.suppress(OSError):
                        half.shutdown(socket.SHUT_WR)
                    continue
                if question.number > 0:
                    self._waiting[question.number] = question
                # If the process has ended, its last messages are still to be received.
                with contextlib.suppress(OSError):
                    if self._has_room():
                        self._control.send((question.number, question.text, question.arguments, question.begin_by))


def receive_part(control: Connection) -> bytes:
    """Return the next part of what comes first. Raises `EOFError` if the program gives that up."""
    return b"".join(iter(control.recv_bytes, b""))
