# SPDX-License-Identifier: MIT OR Apache-2.0

"""Devices that a process of their own serves: that process's side."""

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

from ublk import _ublk
from ublk._device import Device, leave_removal
from ublk._errors import UblkError
from ublk._isolated_questions import ENDS, MADE, receive_part
from ublk._log import log

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from multiprocessing.connection import Connection
    from typing import Self

    from ublk._block_device import BlockDevice

# So many log records wait for the program to take them; then they are lost. It must never hold up the disk.
_RECORDS = 10_000
# A start that is given up: for the stop of its device, and for the rest. The program waits a little longer.
_UNDO_SECONDS = 5.0
_END_SECONDS = 20.0


@dataclass(frozen=True)
class Failure:
    """An exception on its way between processes, of which one may not know its class."""

    pickled: bytes
    text: str

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """Pack an exception; what is not the user's mistake, with its traceback."""
        if not isinstance(error, (UblkError, ValueError, TypeError)):
            error.add_note("".join(["in the process that serves the device:\n", *traceback.format_exception(error)]))
        with contextlib.suppress(Exception):
            return cls(pickle.dumps(error), _text(error))
        return cls(b"", _text(error))

    def restored(self) -> BaseException:
        """Give the exception itself, or one that says which it was."""
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
    """Puts aside log records for a thread that sends them."""

    queue: queue.SimpleQueue[logging.LogRecord | Failure | _Word]

    def enqueue(self, record: logging.LogRecord) -> None:
        """Lose what is too much."""
        if self.queue.qsize() < _RECORDS:
            self.queue.put(record)


class _Word(enum.Enum):
    """What there is to say besides."""

    ENDED = enum.auto()
    """The device begins to end, and no handler is to blame."""
    OVER = enum.auto()
    """Nothing more will come."""


class _Events:
    """Message to the program that is not an answer."""

    def __init__(self, pipe: Connection, levels: Mapping[str, int]) -> None:
        self._pipe = pipe
        # A thread that logs never waits for the program to read.
        self._queue: queue.SimpleQueue[logging.LogRecord | Failure | _Word] = queue.SimpleQueue()
        # If the module that was imported for the class has seen to it by itself, its log goes where it says.
        if not logging.getLogger().handlers:
            logging.getLogger().addHandler(_ToProgram(self._queue))
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
        self._thread = threading.Thread(target=self._forward, name="ublk-events", daemon=True)
        self._thread.start()

    def _forward(self) -> None:
        while (event := self._queue.get()) is not _Word.OVER:
            message: object = event if isinstance(event, Failure) else None
            if isinstance(event, logging.LogRecord):
                # Whatever else a program hangs on its records may have classes that are not known there.
                message = {name: value for name, value in vars(event).items() if isinstance(value, (str, int, float))}
            # The program may have exited.
            with contextlib.suppress(OSError):
                self._pipe.send(message)

    def ending(self, error: BaseException | None) -> None:
        """Report that the device begins to end, with the exception of the handler that caused it."""
        self._queue.put(_Word.ENDED if error is None else Failure.of(error))

    def close(self, seconds: float = 2.0) -> None:
        """Send what is there, if it is taken."""
        self._queue.put(_Word.OVER)
        self._thread.join(seconds)


def serve(
    control: Connection,
    pipe: Connection,
    id: int | None,
    levels: Mapping[str, int],
    fake: bool,
) -> None:
    """Serve a block device until the program says otherwise or is gone; the body of the process."""
    # What the terminal sends is for the program, which stops this in order.
    os.setpgid(0, 0)
    events = _Events(pipe, levels)
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    try:
        # The pipe alone does not show the program's end: whatever the program has forked has it open, too.
        program = os.pidfd_open(parent.pid)
    except ProcessLookupError:
        return
    try:
        device = _Start(control, program, id).run(fake)
    except BaseException as error:
        with contextlib.suppress(OSError):
            control.send(Answer(0, error=Failure.of(error)))
    else:
        with device:
            # One that is recovered was there before.
            _attend(device, control, program, events, announced=id is not None)
    events.close()


class _Start:
    """Starts the device, or serves one that there is; undoes that if the program gives it up or is gone."""

    def __init__(self, control: Connection, program: int, id: int | None) -> None:
        self._control = control
        self._program = program
        self._id = id
        self._device: Device | None = None
        self._over = threading.Event()
        self._over_descriptor = os.eventfd(0, os.EFD_CLOEXEC)

    def run(self, fake: bool) -> Device:
        """Return the device when it is live."""
        threading.Thread(target=self._watch, name="ublk-start", daemon=True).start()
        try:
            parts = [receive_part(self._control) for _ in range(2)]
            try:
                options: Mapping[str, Any] = pickle.loads(parts[0])
                target: BlockDevice = pickle.loads(parts[1])
            except (AttributeError, ImportError) as error:
                # Of an interactive program, say.
                raise TypeError(f"isolated=True needs a class that can be imported from a file: {error}") from None
            parts.clear()
            driver = _ublk.FakeDriver() if fake else None
            if self._id is None:
                device = Device._make(target, **options)
                device._made = lambda: self._made(device)
                device._start(driver)
            else:
                target._check_recovery()
                device = Device._make(target, 1, 1, None, **options)
                device._made = lambda: self._made(device)
                device._recover(self._id, driver)
            return device
        finally:
            self._over.set()
            os.eventfd_write(self._over_descriptor, 1)

    def _made(self, device: Device) -> None:
        """Let the program know what it has to remove if this process does not. Raises if it has given the start up."""
        self._device = device
        with contextlib.suppress(OSError):
            if self._id is None:
                self._control.send(Answer(MADE, device.id))
            if not self._is_given_up(0):
                return
        raise UblkError(errno.ECANCELED, f"{device.path}: the program that starts it has given that up")

    def _is_given_up(self, milliseconds: int | None) -> bool:
        """Wait until the program gives the start up or is gone, or until the start is over."""
        poller = select.poll()
        poller.register(self._control.fileno(), select.POLLRDHUP)
        poller.register(self._program, select.POLLIN)
        poller.register(self._over_descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poller.poll(milliseconds)}
        return bool(ready) and self._over_descriptor not in ready

    def _watch(self) -> None:
        if not self._is_given_up(None):
            return
        device = self._device
        if device is not None:
            try:
                if self._id is None:
                    device._native.stop(_UNDO_SECONDS)
                else:
                    device._native.abandon()
            except UblkError as error:
                log(logging.ERROR, "stopping %s: %s", device.path, error)
        if not self._over.wait(_END_SECONDS):
            # Something is stuck. Its end is that of the process.
            if self._device is not None and self._id is None:
                leave_removal([self._device], recoverable=True)
            os._exit(1)


_SHAPE = ("id", "path", "queues", "depth", "max_io_bytes", "recovery", "can_be_left", "data")


class _Ends:
    """Ends the device on threads of their own: meanwhile the program may ask for an end in less time, or be gone."""

    def __init__(self, device: Device, answer: Callable[[Answer], None]) -> None:
        self._device = device
        self._answer = answer
        self._threads: list[threading.Thread] = []
        # Whether the device is being deleted.
        self.deletes = False
        # Readable once that is over, or the device was left to another server.
        self.over = os.eventfd(0, os.EFD_CLOEXEC)

    def begin(self, number: int, question: str, arguments: tuple[Any, ...]) -> None:
        """End the device as the question has it, and answer after that."""
        end: Callable[[], None] = self._device.quiesce
        if question == "leave" and self._device.can_be_left:
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
            # The device may have ended, and with a failure.
            value = {"stats": native.stats(), "entries": native.entries, "revoked": native.revoked}
        self._answer(Answer(number, value, error))
        if value is not None:
            os.eventfd_write(self.over, 1)

    def join(self, seconds: float = 5.0) -> None:
        """Have all answers sent, once the device has ended."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def _attend(device: Device, control: Connection, program: int, events: _Events, announced: bool) -> None:
    """Answer questions, until one of them ends the device. ``announced`` is whether the program knows of it."""
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
                # Whatever has ended it: the exception is there first.
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
        # One that is being deleted cannot be left to another server any more.
        _orphaned(device, announced and not ends.deletes)


def _orphaned(device: Device, announced: bool) -> None:
    """Do what the end of a program does to the devices that it serves. One that it never heard of goes."""
    if device.recovery is None or not announced:
        return
    try:
        if device.can_be_left:
            device.quiesce()
            return
    except UblkError as error:
        log(logging.ERROR, "leaving %s: %s", device.path, error)
    # As if killed: the driver then keeps the device for another server.
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
