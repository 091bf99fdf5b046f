# SPDX-License-Identifier: MIT OR Apache-2.0

"""Isolated devices: the side of the program, which controls the process that serves the device.

There are two pipes to that process: ``control`` for questions and their answers (`Questions`), and ``events`` for log
records and, finally, the notice that the device has begun to end. If the pipe closes without it, the process has died.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import multiprocessing
import multiprocessing.process
import os
import pickle
import signal
import threading
import traceback
import weakref
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

from ublk import _isolated_server, _lifecycle, _signals, _ublk
from ublk._errors import UblkError
from ublk._isolated_questions import Questions
from ublk._log import log
from ublk._serving import Serving

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from multiprocessing.context import SpawnProcess
    from pathlib import Path

    from ublk._isolated_server import Answer
    from ublk._options import Options
    from ublk._serving import Hooks, Native

# For a process that imports the modules of the program, and then starts the device.
_START_SECONDS = 120.0
_ANSWER_SECONDS = 75.0
# After this time the process refuses to begin. Less than the wait for the answer, which covers what has begun.
_BEGIN_SECONDS = 30.0
# For leaving the device by the process: the engine waits for handlers (60 s), for the driver (40 s), and for commands
# (10 s).
_LEAVE_SECONDS = 130.0
# For a stop by the process, in addition to its wait for handlers.
_STOP_SECONDS = 15.0
_EXIT_SECONDS = 5.0
_STUCK_EXIT_SECONDS = 2.0
_GIVE_UP_SECONDS = 30.0

_spawn = multiprocessing.get_context("spawn")
_remotes: weakref.WeakSet[RemoteDevice] = weakref.WeakSet()


class IsolatedServing(Serving):
    """Has another process serve a copy of the block device, in the way that was chosen for it."""

    needs_python = False
    # Hanging handlers are reported by the other process.
    is_watched = False

    def __init__(self, target: object, served: Serving, hooks: Hooks, options: Options) -> None:
        super().__init__(served.kind, {}, served.operations, hooks)
        self._remote: RemoteDevice | None = None
        try:
            self._payload = pickle.dumps(target)
        except Exception as error:
            error.add_note(f"isolated=True gives a copy of the {served.kind} to another process, by pickling")
            raise
        self._options = dataclasses.replace(options, isolated=False)

    def add(
        self, shape: Mapping[str, Any], options: Options, driver: _ublk.FakeDriver | None, made: list[Native]
    ) -> None:
        """Have the process create the device and go live."""
        self._start(False, driver, made)

    def recover(
        self, shape: Mapping[str, Any], options: Options, driver: _ublk.FakeDriver | None, made: list[Native]
    ) -> None:
        """Have the process serve a device that has lost its server."""
        self._start(True, driver, made)

    def _start(self, recovers: bool, driver: _ublk.FakeDriver | None, made: list[Native]) -> None:
        payload = [pickle.dumps(self._options), self._payload]
        self._payload = b""
        remote = RemoteDevice(recovers, driver is not None)
        self._remote = remote
        made.append(remote)
        remote.begin(payload, self._hooks.die)

    def cancel(self) -> None:
        """Have the process cancel tasks when it stops the device."""
        if self._remote is not None:
            self._remote.cancels = True


class RemoteDevice:
    """Device of another process, with the interface of a `NativeDevice` of this one."""

    # No thread of this process serves it.
    queues_left = 0
    in_handler = False
    served_here = False
    on_kernel = False
    hurried = False

    def __init__(self, recovers: bool, fake: bool) -> None:
        # For the end of the process. Reentrant: a signal handler that interrupts a stop may stop the device, too.
        self._lock = threading.RLock()
        self._die: Callable[[BaseException], None] | None = None
        self.id = -1
        self.ending = False
        self.stopped = False
        self.recovery: str | None = None
        # Readable from the moment when the device begins to end.
        self._ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self._ended).atexit = False
        self._owner = os.getpid()
        self._fake = fake
        # The reason, if a stop has killed the process.
        self._killed = ""
        # Whether a stop cancels tasks at once.
        self.cancels = False
        # Whether a stop leaves the device: from before `leave` is asked for until it is answered.
        self._leaves = False
        self._control, control = _spawn.Pipe()
        self._events, events = _spawn.Pipe(duplex=False)
        levels = {name: logging.getLogger(name).level for name in ("", "ublk")}
        self._theirs = (control, events)
        # Small: starting a process waits without a limit until these are read. The rest goes through the pipe.
        arguments = (control, events, recovers, levels, fake)
        self._process: SpawnProcess = _spawn.Process(
            target=_isolated_server.serve, args=arguments, name="ublk-isolated"
        )

    def begin(self, payload: list[bytes], die: Callable[[BaseException], None]) -> None:
        """Start the process, wait until it serves its device, and then receive its events.

        The payload is the options and the block device, both pickled.
        """
        _remotes.add(self)
        _lifecycle.end_with_worker(_end_left)
        control, events = self._theirs
        # Only the process keeps these ends, so that they close when it ends. Signals are deferred: an exception in
        # between would leave a process without `Questions`.
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
        self.can_quiesce: bool = shape["can_quiesce"]
        self.data_movement: str = shape["data_movement"]
        self._die = die
        self.id = shape["id"]
        # From now on a recoverable device is kept when this program dies.
        self._questions.post("")
        threading.Thread(target=self._listen, name=f"ublk{self.id}events", daemon=True).start()

    def fileno(self) -> int:
        """Return a descriptor that is readable once the device has begun to end."""
        return self._ended

    def busy(self) -> list[tuple[int, int, float]]:
        """Return an empty list: no thread of this process is in a handler."""
        return []

    def go_live(self) -> None:
        """Do nothing: the process has done so."""

    @property
    def revoked(self) -> int:
        """Number of requests that failed because they had not ended in time."""
        return int(self._last.get("revoked", 0))

    @property
    def entries(self) -> int:
        """Number of times that Python was entered for requests in the process."""
        return int(self._ask("entries"))

    def stats(self) -> list[dict[str, Any]]:
        """Return the statistics of each operation."""
        return [dict(operation) for operation in self._ask("stats")]

    def resize(self, size: int) -> None:
        """Change the capacity of the disk."""
        self._ask("resize", size)

    def stop(self, seconds: float) -> None:
        """Delete the device and end the process, which waits for handlers up to so many seconds.

        If that fails, the process is killed. Raises `UblkError` then, although the device is gone, unless tasks are
        cancelled.
        """
        self._finish("leave" if self._leaves else "stop", seconds)

    def hand_over(self) -> None:
        """Make later stops finish what an interrupted `leave` has begun, instead of deleting the device."""
        self._leaves = True

    def leave(self) -> None:
        """Leave the device to another server, and end the process."""
        self._finish("leave")

    def expedite(self) -> None:
        """End the wait of a stop for handlers."""
        # A start may have been aborted before there was a process.
        if hasattr(self, "_questions"):
            self._questions.is_expedited = True
            self._questions.post("expedite")

    def abandon(self) -> None:
        """End the process without stopping the device."""
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
        """Return an error with the way in which the process ended."""
        # Only one thread at a time can reap the process.
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
        # Another stop may set it meanwhile, and so does the end of the device.
        cancels = self.cancels
        if seconds is not None and self._questions.is_expedited:
            seconds = 0.0
        self._resume()
        # The exception of the end of the device, and the reason why it has not ended.
        error: BaseException | None = None
        failure: BaseException | None = None
        # Not again if the device has ended, and only the wait for the process was interrupted.
        if not self._last:
            arguments = (seconds, cancels) if question == "stop" else ()
            begin = _BEGIN_SECONDS if seconds is None else seconds + _STOP_SECONDS
            patience = begin + _LEAVE_SECONDS if seconds is None else begin
            try:
                # Other threads may ask for the same meanwhile: in that process the stop with the least time decides.
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
                # A method that continues without its request keeps the process from ending by itself.
                self._kill(_STUCK_EXIT_SECONDS if self.revoked else _EXIT_SECONDS)
            if error is not None:
                raise error
        elif isinstance(failure, UblkError) and failure.errno == errno.EOWNERDEAD:
            self._finish_dead(cancels)
        elif failure is not None and (question == "leave" or self.recovery is not None):
            raise failure
        else:
            # A handler is stuck, or the process is. Killing it fails the requests.
            self._finish_stuck(failure, cancels)

    def _finish_dead(self, cancels: bool) -> None:
        """Remove the device of a process that has ended by itself."""
        with self._lock:
            if not self._killed:
                try:
                    self._clean_up()
                finally:
                    self._kill(_EXIT_SECONDS)
        # Another stop may have killed the process, which ends this one, too.
        self._report_kill(cancels)

    def _finish_stuck(self, failure: BaseException | None, cancels: bool) -> None:
        """Kill a process that does not stop its device, and remove the device."""
        with self._lock:
            if not self.stopped and not self._last:
                reason = failure.strerror if isinstance(failure, UblkError) else failure
                pid = self._process.pid
                self._killed = f"{self.path}: process {pid} was killed, and its requests failed: {reason}"
                self._kill()
                self._clean_up()
        self._report_kill(cancels)

    def _report_kill(self, cancels: bool) -> None:
        """Raise an error if a stop has killed the process, or log it if this stop cancels."""
        if not self._killed:
            return
        if not cancels:
            raise UblkError(errno.EIO, self._killed)
        log(logging.WARNING, "%s", self._killed)

    def _resume(self) -> None:
        """Continue the process if it was suspended (SIGSTOP) and could not stop the device."""
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._questions.running, signal.SIGCONT)

    def _give_up(self, seconds: float) -> None:
        """End the process of an aborted start, and remove its device if it does not do so itself."""
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
        """Remove the device of a process that has ended, unless it is recoverable."""
        if not self._fake and not self._last:
            self._remove(self.id, self.recovery)

    def _remove(self, id: int, recovery: str | None) -> None:
        try:
            # Another process may have removed the device without a server, and the number may be reused.
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
        """End the process, after so many seconds to do so by itself."""
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
        """Kill the process and remove the device."""
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
        is_announced = False
        with self._events, contextlib.suppress(EOFError, OSError):
            while self._events in wait([self._events, self._questions.running]):
                message = self._events.recv()
                if isinstance(message, dict):
                    _log(logging.makeLogRecord(message))
                    continue
                is_announced = True
                self._note_end(None if message is None else message.restored())
        if not is_announced:
            with self._lock:
                error = None if self.stopped or self._last else self._dead()
            self._note_end(error)

    def _note_end(self, error: BaseException | None) -> None:
        # Before waiting threads are woken.
        if error is not None and self._die is not None:
            self._die(error)
        self._end()


def _log(record: logging.LogRecord) -> None:
    """Log a record of the other process. Exceptions of log handlers are printed, like in `logging`."""
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
    """End all processes, whether their devices stop in time or not."""
    for remote in list(_remotes):
        if remote.stopped or remote._owner != os.getpid():
            continue
        for end in (functools.partial(remote.stop, _lifecycle.STOP_SECONDS), remote.kill):
            try:
                end()
                break
            except UblkError as error:
                log(logging.ERROR, "stopping the device of process %s: %s", remote._process.pid, error)


def _in_forked_child() -> None:
    """Forget the parent's processes, which a child cannot wait for."""
    children: set[object] = getattr(multiprocessing.process, "_children", set())
    for remote in list(_remotes):
        children.discard(remote._process)
    _remotes.clear()


_lifecycle.register_isolated(_end_left, _in_forked_child)
