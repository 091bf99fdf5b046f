# SPDX-License-Identifier: MIT OR Apache-2.0
"""Disks of ours that stand on a store, with their servers, which are killed and followed by others."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from support import udev
from support.command import run
from support.face import NATIVE, device_id
from support.features import has
from support.pace import patience
from support.processes import blocked_stacks, is_running
from support.server import Child
from support.waiting import until

from .findings import Stuck

PROGRAM = Path(__file__).resolve().parent.parent / "uppers.py"
# The driver of 6.12 needs up to half a minute to notice a death.
NOTICE = 60.0


@dataclass(frozen=True)
class Kind:
    """A way to keep a disk on a store."""

    name: str
    # Options of `ublk add`, or the class of a Python disk.
    words: tuple[str, ...] = ()
    python: str = ""
    # Whether the disk has a volatile write cache, so that writes are durable after a flush only.
    cached: bool = True
    # In files of a file system on the store, rather than on the store itself.
    mounted: bool = False
    zoned: bool = False
    needs: tuple[str, ...] = ()

    def available(self) -> bool:
        return all(has(name) for name in self.needs)


FILE = ("-t", "file")
ZONE, ZONED_SIZE = 512 << 10, 8 << 20
KINDS = {
    kind.name: kind
    for kind in (
        Kind("file-direct", (*FILE, "--io", "direct")),
        Kind("file-buffered", (*FILE, "--io", "buffered")),
        Kind("file-direct-no-fua", (*FILE, "--io", "direct", "--fua", "off")),
        Kind("file-direct-no-cache", (*FILE, "--io", "direct", "--write-cache", "off"), cached=False),
        Kind("file-buffered-no-cache", (*FILE, "--io", "buffered", "--write-cache", "off"), cached=False),
        Kind("file-in-ext4", (*FILE, "--io", "auto"), mounted=True),
        Kind("integrity", (*FILE, "--io", "auto", "--integrity", "crc16-t10dif"), mounted=True, needs=("INTEGRITY",)),
        Kind(
            "zoned",
            ("-t", "zoned", "--zone-size", str(ZONE), "--size", str(ZONED_SIZE)),
            mounted=True,
            zoned=True,
            needs=("ZONED",),
        ),
        Kind("python", python="Straight"),
        Kind("python-mapped", python="Mapped"),
        Kind("python-returned", python="Returned"),
        Kind("python-coroutines", python="Coroutines"),
    )
}
# Python disks with a fault, for the test of the judges.
PLANTED = {
    name: Kind(f"planted-{name}", python=name)
    for name in ("FlushesNothing", "FlushesWhatItsQueueWrote", "ForgetsAtRecovery", "WritesLate")
}


@dataclass
class Upper:
    """A disk of ours and its present server."""

    kind: Kind
    backing: str
    path: str
    pid: int
    recovery: str = ""
    servers: int = 1
    child: Child | None = None
    _children: list[Child] = field(default_factory=list)

    @property
    def id(self) -> int:
        return device_id(self.path)

    def kill(self) -> None:
        """SIGKILLs the server and waits for its end."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        wait_for_end(self.pid)

    def recover(self) -> None:
        """Gives the disk a new server."""
        if self.kind.python:
            self.child = serve_python(self.kind.python, self.backing, {"recover": self.id})
            self._children.append(self.child)
            self.pid = self.child.pid
        else:
            NATIVE.run("recover", "-n", str(self.id), timeout=NOTICE)
            self.pid = NATIVE.info(self.path)["pid"]
        self.servers += 1

    def upgrade(self) -> None:
        """Hands the disk over to a new server."""
        old = self.pid
        NATIVE.run("upgrade", "-n", str(self.id), timeout=NOTICE)
        self.pid = NATIVE.info(self.path)["pid"]
        wait_for_end(old)
        self.servers += 1

    def remove(self) -> None:
        """Ends the disk the regular way."""
        NATIVE.run("del", "-n", str(self.id), timeout=NOTICE)
        until(lambda: not os.path.exists(self.path), f"the end of {self.path}", 20)
        if self.child:
            # Its program goes on without the disk until then.
            with contextlib.suppress(BrokenPipeError):
                self.child.process.stdin.close()
        wait_for_end(self.pid)

    def close(self) -> None:
        for child in self._children:
            child.close()


def clear() -> None:
    """Removes what a recording or session left that did not come to its end."""
    for words in (["umount", "/mnt/cut"], ["umount", "/mnt/chaos"], ["ublk", "del", "-a", "--force"]):
        run(words, check=False, timeout=90)


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + patience(NOTICE)
    while is_running(pid):
        if time.monotonic() > deadline:
            raise Stuck(f"server {pid} has not ended within {patience(NOTICE):g} s", stacks_of(pid) + blocked_stacks())
        time.sleep(0.01)


def stacks_of(pid: int) -> str:
    """Where in the kernel the tasks of a process are, with their states."""
    lines = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        with contextlib.suppress(OSError):
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            lines.append(f"task {task.name} of {pid}, {state}:\n{(task / 'stack').read_text()}")
    return "".join(lines)


def serve_python(name: str, backing: str, start: dict) -> Child:
    child = Child([sys.executable, "-u", str(PROGRAM), name, backing, json.dumps(start)])
    try:
        child.answered = json.loads(child.line(60))
    except BaseException:
        child.close()
        raise
    return child


def add(kind: Kind, backing: str, dice: random.Random, *, queues: int, recovery: str = "") -> Upper:
    """A new disk; how its data moves is left to chance."""
    since = udev.now()
    if kind.python:
        start = {"queues": queues, "recoverable": recovery or False}
        child = serve_python(kind.python, backing, start)
        path = child.answered
        upper = Upper(kind, backing, path, child.pid, recovery, child=child, _children=[child])
        udev.wait_until_seen(path, since)
        return upper
    words = [*kind.words, "-f", backing, "-q", str(queues)]
    words += ["--recovery", recovery] if recovery else []
    movements = ["copy", "user-copy"] + (["auto-zero-copy"] if has("AUTO_BUF_REG") else [])
    # Zones and integrity metadata leave no choice.
    if dice.random() < 0.5 and not kind.zoned and not kind.needs:
        words += ["--data", dice.choice(movements)]
    path = NATIVE.add(*words, timeout=60)
    return Upper(kind, backing, path, NATIVE.info(path)["pid"], recovery)


@contextmanager
def mounted(device: str, directory: str) -> Iterator[Path]:
    """An ext4 on a block device, mounted."""
    place = Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    run(["mount", "-t", "ext4", device, place], timeout=60)
    try:
        yield place
    finally:
        run(["umount", place], timeout=120)


@contextmanager
def loop_of(file: str) -> Iterator[str]:
    path = run(["losetup", "--find", "--show", file]).out.strip()
    try:
        yield path
    finally:
        subprocess.run(["losetup", "--detach", path], check=False, timeout=patience(30))
