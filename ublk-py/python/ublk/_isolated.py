# SPDX-License-Identifier: MIT OR Apache-2.0

"""Devices that a process of their own serves: this program's side.

Two pipes lead there. Over ``control`` go questions and their answers (`Questions`). Over ``events`` come log records,
and at last the news that the device has begun to end; if that is missing, the process has died.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import logging
import multiprocessing
import multiprocessing.process
import multiprocessing.util
import os
import pickle
import signal
import threading
import traceback
import weakref
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

from ublk import _device, _isolated_server, _signals, _ublk
from ublk._errors import UblkError
from ublk._isolated_questions import Questions
from ublk._log import log
from ublk._native import NativeDisk
from ublk._serving import PullServing, Serving

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from multiprocessing.context import SpawnProcess
    from pathlib import Path

    from ublk._block_device import BlockDevice
    from ublk._isolated_server import Answer
    from ublk._serving import Native, Report

# A process that imports what the program imports, and then has the kernel read the disk.
_START_SECONDS = 120.0
_ANSWER_SECONDS = 75.0
# What the process gets to later than this it refuses. Less than the wait for the answer, which covers what was begun.
_BEGIN_SECONDS = 30.0
# For the other side's part of leaving the device: the engine waits for handlers (60 s), for the driver (40 s),
# and for commands (10 s).
_LEAVE_SECONDS = 130.0
# For the other side's part of a stop, besides the wait for handlers.
_STOP_SECONDS = 15.0
_EXIT_SECONDS = 5.0
_STUCK_EXIT_SECONDS = 2.0
_GIVE_UP_SECONDS = 30.0

_spawn = multiprocessing.get_context("spawn")
_remotes: weakref.WeakSet[RemoteDevice] = weakref.WeakSet()


def isolate(
    target: BlockDevice | NativeDisk, served: Serving, report: Report, options: Mapping[str, Any]
) -> IsolatedServing:
    """Have another process serve a block device in the way that was found for it."""
    if isinstance(target, NativeDisk):
        raise ValueError(f"{type(target).__name__} is a native disk: there is nothing to isolate")
    if isinstance(served, PullServing):
        raise ValueError("isolated=True cannot be combined with pull=True")
    return IsolatedServing(target, served, report, options)


class IsolatedServing(Serving):
    """Another process has a copy of the block device, and serves it in its own way."""

    needs_python = False

    def __init__(self, target: BlockDevice, served: Serving, report: Report, options: Mapping[str, Any]) -> None:
        super().__init__({}, served.operations, report)
        self.style = "isolated"
        self._remote: RemoteDevice | None = None
        try:
            self._payload = pickle.dumps(target)
        except Exception as error:
            error.add_note(f"isolated=True gives a copy of the {type(target).__name__} to another process, by pickling")
            raise
        self._options = dict(options)

    def add(
        self,
        description: Mapping[str, Any],
        options: Mapping[str, Any],
        driver: _ublk.FakeDriver | None,
        made: list[Native],
    ) -> None:
        """Have the process make the device and go live."""
        recoverable = options["recovery"] or False
        more = {"queues": options["queues"], "depth": options["depth"], "id": options["id"], "recoverable": recoverable}
        self._start(None, {**self._options, **more}, driver, made)

    def recover(
        self,
        description: Mapping[str, Any],
        id: int,
        driver: _ublk.FakeDriver | None,
        made: list[Native],
    ) -> None:
        """Have the process serve a device whose last server is gone."""
        self._start(id, self._options, driver, made)

    def _start(
        self,
        id: int | None,
        options: Mapping[str, Any],
        driver: _ublk.FakeDriver | None,
        made: list[Native],
    ) -> None:
        payload = [pickle.dumps(dict(options)), self._payload]
        self._payload = b""
        remote = RemoteDevice(id, driver is not None)
        self._remote = remote
        made.append(remote)
        remote.begin(payload, self.die)

    def cancel(self) -> None:
        """Have the process do so when it stops the device."""
        if self._remote is not None:
            self._remote.cancels = True


class RemoteDevice:
    """What a `NativeDevice` of this process would be."""

    queues_left = 0

    def __init__(self, id: int | None, fake: bool) -> None:
        # For the end of the process; a signal's handler that interrupts a stop may stop the device, too.
        self._lock = threading.RLock()
        self._die: Callable[[BaseException], None] | None = None
        self.id = -1
        self.ending = False
        self.stopped = False
        self.recovery: str | None = None
        # Readable, for ever, once the device has begun to end.
        self._ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self._ended).atexit = False
        self._owner = os.getpid()
        self._fake = fake
        # What is wrong, if a stop has killed the process.
        self._killed = ""
        # Whether a stop cancels tasks at once.
        self.cancels = False
        # Whether a stop asks for leave: from before that is asked for until it is answered. Then the process knows.
        self._leaves = False
        self._control, control = _spawn.Pipe()
        self._events, events = _spawn.Pipe(duplex=False)
        levels = {name: logging.getLogger(name).level for name in ("", "ublk")}
        self._theirs = (control, events)
        # Small: a start of a process waits without a limit until these are read. The rest goes through the pipe.
        arguments = (control, events, id, levels, fake)
        self._process: SpawnProcess = _spawn.Process(
            target=_isolated_server.serve, args=arguments, name="ublk-isolated"
        )

    def begin(self, payload: list[bytes], die: Callable[[BaseException], None]) -> None:
        """Start the process, wait until it serves its device, and listen to it from then on.

        It gets the options and the block device, both pickled.
        """
        _remotes.add(self)
        _end_with_workers()
        control, events = self._theirs
        # Theirs alone, so that their end is the process's. A signal in between would leave a process without questions.
        with _signals.deferred(), control, events:
            self._process.start()
            assert self._process.pid is not None
            self._questions = Questions(self._control, self._process.pid, payload)
        try:
            shape = self._value(self._questions.wait_for_start, _START_SECONDS)
        except UblkError as error:
            if error.errno != errno.EOWNERDEAD:
                raise
            hint = 'a script that starts isolated devices does so under `if __name__ == "__main__":`'
            raise UblkError(errno.EOWNERDEAD, f"{error.strerror} before the disk was there; {hint}") from None
        self.path: Path = shape["path"]
        self.queues: int = shape["queues"]
        self.depth: int = shape["depth"]
        self.max_io_bytes: int = shape["max_io_bytes"]
        self.recovery = shape["recovery"]
        self.can_be_left: bool = shape["can_be_left"]
        self.data: str = shape["data"]
        self._die = die
        self.id = shape["id"]
        # From now on a device that is to be recovered is kept when this program dies.
        self._questions.post("")
        threading.Thread(target=self._listen, name=f"ublk{self.id}events", daemon=True).start()

    def fileno(self) -> int:
        """Give what is readable once the device has begun to end."""
        return self._ended

    def go_live(self) -> None:
        """Nothing: the process has done so."""

    @property
    def revoked(self) -> int:
        """How many requests have failed because they had not ended in time."""
        return int(self._last.get("revoked", 0))

    @property
    def entries(self) -> int:
        """How often that process's Python was entered for requests."""
        return int(self._ask("entries"))

    def stats(self) -> list[dict[str, Any]]:
        """Return the statistics of each operation."""
        return [dict(operation) for operation in self._ask("stats")]

    def resize(self, size: int) -> None:
        """Change the disk's capacity."""
        self._ask("resize", size)

    def stop(self, seconds: float) -> None:
        """Have the device deleted, and the process gone. It waits for handlers for so many seconds.

        If that does not work, it is killed. Raises `UblkError` then, although the device is gone, unless tasks are
        cancelled.
        """
        self._finish("leave" if self._leaves else "stop", seconds)

    def hand_over(self) -> None:
        """Have no later stop delete the device: one asks for what `leave` may not have asked for."""
        self._leaves = True

    def leave(self) -> None:
        """Have the device left to another server, and the process gone."""
        self._finish("leave")

    def expedite(self) -> None:
        """Have a stop wait no longer for handlers."""
        # A start may have been given up before there was a process.
        if hasattr(self, "_questions"):
            self._questions.is_expedited = True
            self._questions.post("expedite")

    def abandon(self) -> None:
        """Have the process gone, whatever becomes of the device."""
        with self._lock:
            self._kill()

    def _ask(self, question: str, *arguments: object) -> Any:
        if self._owner != os.getpid():
            raise UblkError(
                errno.ESRCH, f"{self.path} belongs to process {self._owner}, from which this one was forked"
            )
        if question not in self._last:
            try:
                ask = functools.partial(self._questions.ask, question, *arguments, begin=_BEGIN_SECONDS)
                return self._value(ask, _ANSWER_SECONDS)
            except UblkError:
                # Another thread may have stopped the device meanwhile.
                if question not in self._last:
                    raise
        return self._last[question]

    @property
    def _last(self) -> dict[str, Any]:
        return self._questions.last if hasattr(self, "_questions") else {}

    def _value(self, ask: Callable[..., Answer], seconds: float) -> Any:
        answer = self._answer(ask, seconds)
        if answer.error is not None:
            raise answer.error.restored()
        return answer.value

    def _answer(self, ask: Callable[..., Answer], seconds: float) -> Answer:
        try:
            return ask(seconds=seconds)
        except EOFError:
            raise self._dead() from None
        except TimeoutError:
            text = f"process {self._process.pid}, which serves the device, does not answer after {seconds:g} s"
            raise UblkError(errno.ETIMEDOUT, text) from None

    def _dead(self) -> UblkError:
        """Return an error that says how the process ended."""
        # Only one thread at a time can learn of that.
        with self._lock:
            self._process.join(_EXIT_SECONDS)
            status = self._process.exitcode
        if status is None:
            how = "has closed its pipes"
        elif status < 0:
            how = f"was killed by {_signal_name(-status)}"
        else:
            how = f"ended with status {status}"
        served = f"served {self.path}" if self.id >= 0 else "was to serve the device"
        return UblkError(errno.EOWNERDEAD, f"process {self._process.pid}, which {served}, {how}")

    def _finish(self, question: str, seconds: float | None = None) -> None:
        if self.stopped:
            return
        if self.id < 0:
            self._give_up(_GIVE_UP_SECONDS)
            return
        # Another stop may cancel meanwhile, and the end of the device does.
        cancels = self.cancels
        if seconds is not None and self._questions.is_expedited:
            seconds = 0.0
        self._resume()
        # What the end of the device has raised, and why that is still to come.
        error: BaseException | None = None
        failure: BaseException | None = None
        # Not again, if only the end of the process was not waited for.
        if not self._last:
            arguments = (seconds, cancels) if question == "stop" else ()
            begin = _BEGIN_SECONDS if seconds is None else seconds + _STOP_SECONDS
            patience = begin + _LEAVE_SECONDS if seconds is None else begin
            try:
                # Others may ask for the same meanwhile: that process finds out which of them has the least time.
                ask = functools.partial(self._questions.ask, question, *arguments, begin=begin)
                answer = self._answer(ask, patience)
                error = failure = None if answer.error is None else answer.error.restored()
                if question == "leave":
                    # If it was refused, a stop deletes the device again.
                    self._leaves = False
            except UblkError as lost:
                failure = lost
        if self._last:
            with self._lock:
                # A method that goes on without its request keeps the process from ending by itself.
                self._kill(_STUCK_EXIT_SECONDS if self.revoked else _EXIT_SECONDS)
            if error is not None:
                raise error
        elif isinstance(failure, UblkError) and failure.errno == errno.EOWNERDEAD:
            self._finish_dead(cancels)
        elif failure is not None and (question == "leave" or self.recovery is not None):
            raise failure
        else:
            # A handler is stuck, or the process. Its end is that of the requests.
            self._finish_stuck(failure, cancels)

    def _finish_dead(self, cancels: bool) -> None:
        """Remove the device of a process that has ended by itself."""
        with self._lock:
            if not self._killed:
                try:
                    self._clean_up()
                finally:
                    self._kill(_EXIT_SECONDS)
        # Another stop, which has ended this one, too.
        self._report_kill(cancels)

    def _finish_stuck(self, failure: BaseException | None, cancels: bool) -> None:
        """Kill a process that does not stop its device, and remove that."""
        with self._lock:
            if not self.stopped and not self._last:
                reason = failure.strerror if isinstance(failure, UblkError) else failure
                pid = self._process.pid
                self._killed = f"{self.path}: process {pid} was killed, and its requests failed: {reason}"
                self._kill()
                self._clean_up()
        self._report_kill(cancels)

    def _report_kill(self, cancels: bool) -> None:
        """Raise if a stop has killed the process, or log that if it is one that cancels."""
        if not self._killed:
            return
        if not cancels:
            raise UblkError(errno.EIO, self._killed)
        log(logging.WARNING, "%s", self._killed)

    def _resume(self) -> None:
        """Let a process go on that was suspended (SIGSTOP), which would keep the device."""
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._questions.running, signal.SIGCONT)

    def _give_up(self, seconds: float) -> None:
        """End a process whose start is given up, and remove what it has made if it does not do so by itself."""
        with self._lock:
            # Before that it has nothing to remove.
            is_given = hasattr(self, "_questions") and self._questions.is_given
            if is_given:
                self._resume()
            self._kill(seconds if is_given else 0.0)
            if self._process.pid is None or self._process.exitcode == 0:
                return
            self._questions.join(_EXIT_SECONDS)
            if self._questions.made is not None and not self._fake:
                self._remove(self._questions.made, None)

    def _clean_up(self) -> None:
        """Remove the device of a process that is gone, unless it is to wait for another."""
        if not self._fake and not self._last:
            self._remove(self.id, self.recovery)

    def _remove(self, id: int, recovery: str | None) -> None:
        try:
            # A process that found it without a server may have removed it, and another device may have its number.
            if _ublk.device(id)["pid"] not in (None, self._process.pid):
                return
            if recovery is not None:
                log(logging.WARNING, "%s waits for another server: ublk.recover(%d, ...)", self.path, id)
            else:
                _ublk.delete(id, True)
        except UblkError as error:
            if error.errno != errno.ENODEV:
                raise

    def _kill(self, seconds: float = 0.0) -> None:
        """End the process, which has so many seconds to do so by itself."""
        if hasattr(self, "_questions"):
            self._questions.close()
        else:
            self._control.close()
        if self._process.pid is not None:
            self._process.join(seconds)
            if self._process.exitcode is None:
                self._process.kill()
                self._process.join(_EXIT_SECONDS)
        self.stopped = True
        self._end()

    def kill(self) -> None:
        """Remove the device, whatever its process is doing."""
        with self._lock:
            if not self.stopped and self.id < 0:
                self._give_up(0.0)
            elif not self.stopped:
                self._kill()
                self._clean_up()

    def _end(self) -> None:
        self.ending = True
        os.eventfd_write(self._ended, 1)

    def _listen(self) -> None:
        told = False
        with self._events, contextlib.suppress(EOFError, OSError):
            while self._events in wait([self._events, self._questions.running]):
                message = self._events.recv()
                if isinstance(message, dict):
                    _log(logging.makeLogRecord(message))
                    continue
                told = True
                self._tell(None if message is None else message.restored())
        if not told:
            with self._lock:
                error = None if self.stopped or self._last else self._dead()
            self._tell(error)

    def _tell(self, error: BaseException | None) -> None:
        # Before waiting threads are woken.
        if error is not None and self._die is not None:
            self._die(error)
        self._end()


def _log(record: logging.LogRecord) -> None:
    """Have the program's handlers log a record. What they raise is reported as logging does, and not propagated."""
    try:
        log = logging.getLogger(record.name)
        if log.isEnabledFor(record.levelno):
            log.handle(record)
    except Exception:
        traceback.print_exc()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _end_left() -> None:
    """Have no process left, whether its device stops in time or not."""
    for remote in list(_remotes):
        if remote.stopped or remote._owner != os.getpid():
            continue
        for end in (functools.partial(remote.stop, _device.STOP_SECONDS), remote.kill):
            try:
                end()
                break
            except UblkError as error:
                log(logging.ERROR, "stopping the device of process %s: %s", remote._process.pid, error)


_ends_with_worker = -1


def _end_with_workers() -> None:
    """See to it that this happens in processes of multiprocessing's, too, where exit handlers do not run."""
    global _ends_with_worker
    if _ends_with_worker != os.getpid():
        _ends_with_worker = os.getpid()
        multiprocessing.util.Finalize(None, _end_left, exitpriority=10)


def _in_forked_child() -> None:
    """Forget the parent's processes, which are not this one's to wait for."""
    children: set[object] = getattr(multiprocessing.process, "_children", set())
    for remote in list(_remotes):
        children.discard(remote._process)
    _remotes.clear()


os.register_at_fork(after_in_child=_in_forked_child)


# Handlers run from the last to the first. That of `multiprocessing.util`, which is imported above, waits for processes.
atexit.register(_end_left)
atexit.unregister(_device._stop_all)
atexit.register(_device._stop_all)
