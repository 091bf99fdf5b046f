# SPDX-License-Identifier: MIT OR Apache-2.0
"""Disks of `disks.py`, served by processes of their own."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import udev
from .face import device_id
from .pace import patience

HERE = Path(__file__).resolve().parent.parent


class ServerFailed(Exception):
    """The server answered with an error."""


class Child:
    """A process with its standard error in a file, its standard output read line by line."""

    def __init__(self, argv: list[str], **options: Any) -> None:
        # Open as long as this object is.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
            **options,
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.process.stdout, selectors.EVENT_READ)
        self._pending = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        """What the process has written to standard error."""
        return os.pread(self._stderr.fileno(), 1 << 20, 0).decode(errors="replace")

    def line(self, seconds: float = 20.0) -> str:
        """The next line of its output."""
        seconds = patience(seconds)
        while b"\n" not in self._pending:
            if not self._selector.select(seconds):
                raise AssertionError(f"no line from process {self.pid} within {seconds:g} s; its log:\n{self.log}")
            chunk = os.read(self.process.stdout.fileno(), 1 << 16)
            if not chunk:
                status = self.wait()
                raise AssertionError(f"process {self.pid} ended with status {status}; its log:\n{self.log}")
            self._pending += chunk
        line, self._pending = self._pending.split(b"\n", 1)
        return line.decode()

    def say(self, line: str) -> None:
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = 20.0) -> int:
        """Its exit status, negative for a signal."""
        seconds = patience(seconds)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"process {self.pid} still runs after {seconds:g} s; its log:\n{self.log}") from None

    def close(self) -> None:
        """Ends it for good if it did not end."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(patience(20))
        self._selector.close()
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self._stderr.close()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Server(Child):
    """Disks of one class. Leaving the `with` block stops them and asserts a clean end."""

    def __init__(
        self,
        disk: str,
        *,
        queues: int = 1,
        depth: int = 128,
        id: int | None = None,
        count: int = 1,
        workers: int | None = None,
        recoverable: bool | str = False,
        recover: int | None = None,
        isolated: bool = False,
        shared_memory: bool = False,
        coalesce_usecs: int = 0,
        **args: Any,
    ) -> None:
        start: dict[str, Any] = {} if workers is None else {"workers": workers}
        start |= {"isolated": True} if isolated else {}
        start |= {"shared_memory": True} if shared_memory else {}
        start |= {"coalesce_usecs": coalesce_usecs} if coalesce_usecs else {}
        if recover is None:
            start |= {"queues": queues, "depth": depth, "recoverable": recoverable}
            start |= {} if id is None else {"id": id}
        wanted = {"disk": disk, "args": args, "start": start, "count": count, "recover": recover}
        since = udev.now()
        super().__init__([sys.executable, "-u", str(HERE / "agent.py"), json.dumps(wanted)])
        self._over = False
        try:
            self.paths: list[str] = self._answer()
            for path in self.paths if recover is None else []:
                udev.wait_until_seen(path, since)
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> str:
        return self.paths[0]

    @property
    def id(self) -> int:
        return device_id(self.path)

    def _answer(self, seconds: float = 30.0) -> Any:
        answer = json.loads(self.line(seconds))
        if "error" in answer:
            raise ServerFailed(answer["error"])
        return answer["value"]

    def ask(self, expression: str, seconds: float = 30.0) -> Any:
        """The value of a Python expression over `disk` and `dev` in the server."""
        self.say(expression)
        return self._answer(seconds)

    def stop(self, seconds: float = 30.0) -> None:
        """Ends the server the regular way."""
        self._over = True
        self.process.stdin.close()
        status = self.wait(seconds)
        assert status == 0, f"the server ended with status {status}; its log:\n{self.log}"

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Ends the server by a signal and returns its status."""
        self._over = True
        self.signal(number)
        return self.wait()

    def expect_end(self) -> None:
        """The test makes the server end by other means."""
        self._over = True

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and not self._over:
                self.stop()
        finally:
            self.close()
