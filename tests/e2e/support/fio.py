# SPDX-License-Identifier: MIT OR Apache-2.0
"""fio as a judge of data and as a source of load."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from . import sysfs
from .command import Result, run
from .pace import patience
from .waiting import until


def _argv(path: str, options: dict[str, Any]) -> list[str]:
    words = ["fio", "--name=job", f"--filename={path}", "--ioengine=io_uring", "--direct=1", "--allow_file_create=0"]
    return words + [f"--{name}={value}" for name, value in options.items()]


def verify(path: str, **options: Any) -> dict[str, Any]:
    """Writes with checksums and reads everything back; returns the job's results."""
    wanted = {"rw": "randwrite", "verify": "crc32c", "verify_fatal": 1, "do_verify": 1} | options
    return measure(path, **wanted)


def measure(path: str, **options: Any) -> dict[str, Any]:
    """Runs a job to its end; returns its results."""
    result: Result = run([*_argv(path, options), "--output-format=json"], timeout=120)
    job = json.loads(result.out[result.out.index("{") :])["jobs"][0]
    assert job["error"] == 0, str(result)
    return job


class Running:
    """fio in the background, until it is stopped or has nothing left to work on."""

    def __init__(self, path: str, argv: list[str]) -> None:
        self.path = path
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # A process group of its own.
            start_new_session=True,
        )

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def wait_until_busy(self, requests: int = 200) -> None:
        """Waits until so many requests have been finished."""

        def enough() -> bool:
            assert self.process.poll() is None, f"fio ended with status {self.process.returncode}"
            return sysfs.requests(self.path) >= requests

        until(enough, f"{requests} requests on {self.path}", 30)

    def wait(self, seconds: float = 30.0) -> int:
        """fio's status; it must end by itself in time."""
        seconds = patience(seconds)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"fio on {self.path} still runs after {seconds:g} s") from None

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                self.process.wait(patience(20))
            except subprocess.TimeoutExpired:
                self.signal(signal.SIGKILL)
                self.process.wait(patience(20))


class Steady(Running):
    """fio on a file of a mounted file system: writes for about so many seconds, reads all of it back, and starts again.

    It ends with the first failure, or after the run in which the test begins to wait for it.
    """

    def __init__(self, path: str, directory: os.PathLike, *, blocks: int, seconds: int) -> None:
        argv = ["fio", "--name=job", f"--directory={directory}", "--ioengine=io_uring", "--direct=1", "--iodepth=8"]
        argv += ["--rw=randwrite", "--bs=4k", f"--size={blocks * 4}k", f"--rate_iops={blocks // seconds}"]
        argv += ["--verify=crc32c", "--do_verify=1", "--verify_fatal=1"]
        self._directory = tempfile.TemporaryDirectory()
        self._last = Path(self._directory.name, "last")
        super().__init__(path, ["sh", "-c", 'until [ -e "$0" ]; do "$@" || exit; done', str(self._last), *argv])

    def wait(self, seconds: float = 30.0) -> int:
        self._last.touch()
        return super().wait(seconds)

    def __exit__(self, *details: object) -> None:
        super().__exit__(*details)
        self._directory.cleanup()


class Load(Running):
    """fio on the disk itself."""

    def __init__(self, path: str, seconds: int = 60, **options: Any) -> None:
        wanted = {"rw": "randrw", "bs": "4k", "iodepth": 16, "time_based": 1, "runtime": seconds} | options
        super().__init__(path, _argv(path, wanted))
