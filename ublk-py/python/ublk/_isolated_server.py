# SPDX-License-Identifier: MIT OR Apache-2.0

"""Isolated devices: the side of the process that serves the device."""

from __future__ import annotations

import contextlib
import enum
import errno
import functools
import logging
import logging.handlers
import multiprocessing
import os
import pickle
import queue
import select
import threading
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ublk import _driver, _start, _ublk
from ublk._device import Device
from ublk._errors import UblkError
from ublk._isolated_questions import ENDS, MADE, receive_part
from ublk._lifecycle import leave_removal
from ublk._log import log

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from multiprocessing.connection import Connection
    from typing import Self

    from ublk._block_device import BlockDevice
    from ublk._options import Options

# Maximum number of log records that wait for the program; further ones are dropped, so that the disk never waits.
_RECORDS = 10_000
# Limits for an aborted start: for stopping its device, and for the rest. The program waits a little longer.
_UNDO_SECONDS = 5.0
_END_SECONDS = 20.0


@dataclass(frozen=True)
class Failure:
    """Exception that is passed between processes. The receiver may be unable to import its class."""

    pickled: bytes
    text: str

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """Pack an exception, with its traceback unless it is an expected one."""
        if not isinstance(error, (UblkError, ValueError, TypeError)):
            error.add_note("".join(["in the process that serves the device:\n", *traceback.format_exception(error)]))
        with contextlib.suppress(Exception):
            return cls(pickle.dumps(error), _text(error))
        return cls(b"", _text(error))

    def restored(self) -> BaseException:
        """Return the exception, or an `UblkError` with its text if it cannot be unpickled."""
        with contextlib.suppress(Exception):
            error = pickle.loads(self.pickled)
            if isinstance(error, BaseException):
                return error
        return UblkError(errno.EIO, self.text)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Answer:
    """Answer to a question; the first one reports the start."""

    number: int
    value: Any = None
    error: Failure | None = None


class _ToProgram(logging.handlers.QueueHandler):
    """Queues log records for the thread that sends them."""

    queue: queue.SimpleQueue[logging.LogRecord | Failure | _Notice]

    def enqueue(self, record: logging.LogRecord) -> None:
        """Queue a record, or drop it if there are too many."""
        if self.queue.qsize() < _RECORDS:
            self.queue.put(record)


class _Notice(enum.Enum):
    """Event without data."""

    ENDED = enum.auto()
    """The device begins to end, and not because of an exception of a handler."""
    OVER = enum.auto()
    """There are no more events."""


class _Events:
    """Sends messages to the program that are not answers."""

    def __init__(self, pipe: Connection, levels: Mapping[str, int]) -> None:
        self._pipe = pipe
        # A thread that logs never waits for the program.
        self._queue: queue.SimpleQueue[logging.LogRecord | Failure | _Notice] = queue.SimpleQueue()
        # Unless the module of the class has configured logging.
        if not logging.getLogger().handlers:
            logging.getLogger().addHandler(_ToProgram(self._queue))
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
        self._thread = threading.Thread(target=self._forward, name="ublk-events", daemon=True)
        self._thread.start()

    def _forward(self) -> None:
        while (event := self._queue.get()) is not _Notice.OVER:
            message: object = event if isinstance(event, Failure) else None
            if isinstance(event, logging.LogRecord):
                # Other attributes of a record may have classes that the program cannot import.
                message = {name: value for name, value in vars(event).items() if isinstance(value, (str, int, float))}
            # The program may have exited.
            with contextlib.suppress(OSError):
                self._pipe.send(message)

    def ending(self, error: BaseException | None) -> None:
        """Report that the device begins to end, with the exception of the handler that caused it."""
        self._queue.put(_Notice.ENDED if error is None else Failure.of(error))

    def close(self, seconds: float = 2.0) -> None:
        """Send the queued events, within so many seconds."""
        self._queue.put(_Notice.OVER)
        self._thread.join(seconds)


def serve(
    control: Connection,
    pipe: Connection,
    recovers: bool,
    levels: Mapping[str, int],
    fake: bool,
) -> None:
    """Serve a block device until the program ends it or exits; the body of the process."""
    # Signals of the terminal go to the program only, which stops this process in order.
    os.setpgid(0, 0)
    events = _Events(pipe, levels)
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    try:
        # The pipe does not close with the program if a child of it still has the other end open.
        program = os.pidfd_open(parent.pid)
    except ProcessLookupError:
        return
    try:
        device = _Start(control, program, recovers).run(fake)
    except BaseException as error:
        with contextlib.suppress(OSError):
            control.send(Answer(0, error=Failure.of(error)))
    else:
        with device:
            # The program knows the number of a device that it recovers.
            _attend(device, control, program, events, announced=recovers)
    events.close()


class _Start:
    """Starts or recovers the device, and undoes that if the program aborts the start or exits."""

    def __init__(self, control: Connection, program: int, recovers: bool) -> None:
        self._control = control
        self._program = program
        self._recovers = recovers
        self._device: Device | None = None
        self._over = threading.Event()
        self._over_descriptor = os.eventfd(0, os.EFD_CLOEXEC)

    def run(self, fake: bool) -> Device:
        """Return the device when it is live."""
        threading.Thread(target=self._watch, name="ublk-start", daemon=True).start()
        try:
            parts = [receive_part(self._control) for _ in range(2)]
            try:
                options: Options = pickle.loads(parts[0])
                target: BlockDevice = pickle.loads(parts[1])
            except (AttributeError, ImportError) as error:
                # A class of an interactive session, for example.
                raise TypeError(f"isolated=True needs a class that can be imported from a file: {error}") from None
            parts.clear()
            if self._recovers:
                target._check_recovery()
            device = Device._make(target, options)
            device._made = lambda: self._made(device)
            with _driver.using(_ublk.FakeDriver()) if fake else contextlib.nullcontext():
                if self._recovers:
                    _start.take_over(device)
                else:
                    _start.start(device)
            return device
        finally:
            self._over.set()
            os.eventfd_write(self._over_descriptor, 1)

    def _made(self, device: Device) -> None:
        """Report the device, which the program removes if this process does not. Raises if the start was aborted."""
        self._device = device
        with contextlib.suppress(OSError):
            if not self._recovers:
                self._control.send(Answer(MADE, device.id))
            if not self._is_aborted(0):
                return
        raise UblkError(errno.ECANCELED, f"{device.path}: the program has aborted the start")

    def _is_aborted(self, milliseconds: int | None) -> bool:
        """Wait until the start is aborted, the program exits, or the start is over; return True unless it is over."""
        poller = select.poll()
        poller.register(self._control.fileno(), select.POLLRDHUP)
        poller.register(self._program, select.POLLIN)
        poller.register(self._over_descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poller.poll(milliseconds)}
        return bool(ready) and self._over_descriptor not in ready

    def _watch(self) -> None:
        if not self._is_aborted(None):
            return
        device = self._device
        if device is not None:
            try:
                if self._recovers:
                    device._native.abandon()
                else:
                    device._native.stop(_UNDO_SECONDS)
            except UblkError as error:
                log(logging.ERROR, "stopping %s: %s", device.path, error)
        if not self._over.wait(_END_SECONDS):
            # Something is stuck, and ends only with the process.
            if self._device is not None and not self._recovers:
                leave_removal([self._device], recoverable=True)
            os._exit(1)


_SHAPE = ("id", "path", "queues", "depth", "max_io_bytes", "recovery", "can_quiesce", "data_movement")


class _Ends:
    """Ends the device on threads, because the program may ask for an end in less time meanwhile, or exit."""

    def __init__(self, device: Device, answer: Callable[[Answer], None]) -> None:
        self._device = device
        self._answer = answer
        self._threads: list[threading.Thread] = []
        # Whether the device is being deleted.
        self.deletes = False
        # Readable once the device was deleted or left to another server.
        self.over = os.eventfd(0, os.EFD_CLOEXEC)

    def begin(self, number: int, question: str, arguments: tuple[Any, ...]) -> None:
        """End the device as the question says, and then answer."""
        end: Callable[[], None] = self._device.quiesce
        if question == "leave" and self._device.can_quiesce:
            # Here, so that no stop that is read after this deletes the device, whichever thread comes first.
            self._device._native.hand_over()
        if question == "stop":
            self.deletes = True
            seconds, cancel = arguments
            end = functools.partial(self._device._end_in, seconds, cancel)
        thread = threading.Thread(target=self._end, args=[number, end], name="ublk-stop", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _end(self, number: int, end: Callable[[], None]) -> None:
        native = self._device._native
        error: Failure | None = None
        try:
            end()
        except Exception as raised:
            error = Failure.of(raised)
        value: dict[str, Any] | None = None
        if error is None or native.stopped:
            # The device may have ended even though the stop failed.
            value = {"stats": native.stats(), "entries": native.entries, "revoked": native.revoked}
        self._answer(Answer(number, value, error))
        if value is not None:
            os.eventfd_write(self.over, 1)

    def join(self, seconds: float = 5.0) -> None:
        """Wait until all answers are sent, after the device has ended."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def _attend(device: Device, control: Connection, program: int, events: _Events, announced: bool) -> None:
    """Answer questions until one of them ends the device. ``announced``: whether the program knows its number."""
    native = device._native
    sending = threading.Lock()

    def answer(answer: Answer) -> None:
        with sending, contextlib.suppress(OSError):
            control.send(answer)

    ends = _Ends(device, answer)
    try:
        control.send(Answer(0, {name: getattr(native, name) for name in _SHAPE}))
        poller = select.poll()
        for descriptor in (control.fileno(), native.fileno(), program, ends.over):
            poller.register(descriptor, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poller.poll()}
            if native.fileno() in ready:
                poller.unregister(native.fileno())
                # The exception is set before the device begins to end.
                events.ending(device._exception)
            if ends.over in ready:
                ends.join()
                return
            if control.fileno() in ready:
                number, question, arguments, begin_by = control.recv()
                announced = True
                if time.monotonic() > begin_by:
                    # The program waits no longer, or not for long enough.
                    text = f"process {os.getpid()}, which serves {device.path}, was too late to {question}"
                    answer(Answer(number, error=Failure.of(UblkError(errno.ETIMEDOUT, text))))
                elif question in ENDS:
                    ends.begin(number, question, arguments)
                elif question == "expedite":
                    native.expedite()
                elif question:
                    answer(_answer(device, number, question, arguments))
            elif program in ready:
                raise EOFError
    except (EOFError, OSError):
        # A device that is being deleted cannot be left to another server any more.
        _orphaned(device, announced and not ends.deletes)


def _orphaned(device: Device, announced: bool) -> None:
    """End the device like the end of a program ends its devices; delete it if the program does not know its number."""
    if device.recovery is None or not announced:
        return
    try:
        if device.can_quiesce:
            device.quiesce()
            return
    except UblkError as error:
        log(logging.ERROR, "leaving %s: %s", device.path, error)
    # Exit as if killed: the driver then keeps the device for another server.
    os._exit(1)


def _answer(device: Device, number: int, question: str, arguments: tuple[Any, ...]) -> Answer:
    try:
        if question == "resize":
            device.resize(*arguments)
            return Answer(number)
        native = device._native
        return Answer(number, native.stats() if question == "stats" else native.entries)
    except Exception as error:
        return Answer(number, error=Failure.of(error))
