# SPDX-License-Identifier: MIT OR Apache-2.0
"""Devices whose servers speak the driver's protocol themselves (`raw_server.py`), for ordinary users, too."""

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from . import raw
from .blockio import SECTOR, Disk, Tasks, error_of
from .processes import kill
from .server import HERE, Child
from .waiting import until

ALICE, BOB = 1000, 1001
# A request's time-out in the driver.
TIME_OUT = 30.0
# Where a read is kept by the server.
HELD = 8 * 55 * SECTOR

_USERFAULTFD = 323
_UFFDIO_API, _UFFDIO_REGISTER, _UFFDIO_WRITEPROTECT = 0xC018AA3F, 0xC020AA00, 0xC018AA06
_UFFD_FEATURE_PAGEFAULT_FLAG_WP, _UFFDIO_REGISTER_MODE_WP, _UFFDIO_WRITEPROTECT_MODE_WP = 1 << 0, 1 << 1, 1 << 0


class RawServer(Child):
    """`raw_server.py` with these options; ends with the `with` block, and so does its device."""

    def __init__(self, **options: Any) -> None:
        super().__init__([sys.executable, "-u", str(HERE / "raw_server.py"), json.dumps(options)])
        self.id = int(self.line())
        self.node = raw.BLOCK_DEVICE.format(self.id)
        user = options.get("uid", 0)
        for node in (raw.CHAR_DEVICE, raw.BLOCK_DEVICE) if user else ():
            self._give(node.format(self.id), user)
        ready = json.loads(self.line())
        self.server, self.keeper = ready["pid"], ready["keeper"]

    def _give(self, node: str, user: int) -> None:
        """A node to a user, as a rule of udev would; the block device's comes when the disk starts."""

        def give() -> None:
            until(lambda: os.path.exists(node), node, 60)
            with contextlib.suppress(FileNotFoundError):
                os.chown(node, user, user)

        threading.Thread(target=give, daemon=True).start()

    def ask(self, expression: str) -> Any:
        """The value of an expression over `server` in the process that serves."""
        self.say(expression)
        return json.loads(self.line())

    def until_held(self) -> None:
        """Until the server has the read that it keeps."""
        until(lambda: self.ask("len(server.held)"), "the read at the server")

    def __exit__(self, *_: object) -> None:
        for pid in (self.keeper, self.server):
            if pid:
                kill(pid)
        self.close()
        with raw.Control() as control, contextlib.suppress(FileNotFoundError, OSError):
            control.delete(self.id, by_path=bool(control_needs_path(self.id)))
        until(lambda: not os.path.exists(raw.CHAR_DEVICE.format(self.id)), "the device's end", 60)


def control_needs_path(number: int) -> bool:
    """Whether a device is an ordinary user's."""
    return os.stat(raw.CHAR_DEVICE.format(number)).st_uid != 0


class HangingFile(Child):
    """`hanging_file.py`, mounted in a place that users reach."""

    def __init__(self) -> None:
        self._directory = tempfile.mkdtemp()
        os.chmod(self._directory, 0o755)
        super().__init__([sys.executable, "-u", str(HERE / "hanging_file.py"), self._directory])
        self._mounted = self.line() == "mounted"
        self.path = f"{self._directory}/file"

    def close(self) -> None:
        """Reads that wait end with an error, and the file is gone."""
        super().close()
        if not self._mounted:
            return
        subprocess.run(["umount", "--lazy", self._directory], check=True)
        os.rmdir(self._directory)
        self._mounted = False


class FailingAdd:
    """A process that adds a device of this number, and gets no result: ADD_DEV waits to write it until `fail()`.

    It ends with the `with` block, if it was not killed before.
    """

    def __init__(self, number: int, flags: int, depth: int = 8) -> None:
        take_away, self._take_away = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _add_without_result(number, flags, depth, take_away)
            finally:
                os._exit(1)
        os.close(take_away)

    def fail(self) -> None:
        """Take the memory for the result away."""
        os.write(self._take_away, b"x")

    def __enter__(self) -> "FailingAdd":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._take_away)
        kill(self.pid)
        os.waitpid(self.pid, 0)


def _add_without_result(number: int, flags: int, depth: int, take_away: int) -> None:
    # Private: such memory can be protected against writing on all kernels.
    memory = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = raw.address_of(memory)
    faults = raw.system_call(_USERFAULTFD, ctypes.c_int(os.O_CLOEXEC))

    def protect() -> None:
        # The arguments can be read; a write waits for a handler, which there is not.
        for request, argument in (
            (_UFFDIO_API, struct.pack("=3Q", 0xAA, _UFFD_FEATURE_PAGEFAULT_FLAG_WP, 0)),
            (_UFFDIO_REGISTER, struct.pack("=4Q", address, len(memory), _UFFDIO_REGISTER_MODE_WP, 0)),
            (_UFFDIO_WRITEPROTECT, struct.pack("=3Q", address, len(memory), _UFFDIO_WRITEPROTECT_MODE_WP)),
        ):
            fcntl.ioctl(faults, request, bytearray(argument))

    control = raw.Control()
    control.send_add(flags, depth, number, memory, protect)
    os.read(take_away, 1)
    assert ctypes.CDLL(None).munmap(ctypes.c_void_p(address), ctypes.c_size_t(len(memory))) == 0
    # The write is tried again, and fails.
    os.close(faults)
    while True:
        signal.pause()


def read_held(tasks: Tasks, path: str) -> list[int]:
    """Start a read that the server keeps; the list gets the errno that it ends with."""
    result: list[int] = []

    def read() -> None:
        with Disk(path, direct=True, read_only=True) as disk:
            result.append(error_of(lambda: disk.read(HELD, 4096)))

    tasks.start(read)
    return result


def as_user(uid: int, action: Callable[[], int]) -> int:
    """Runs an action in a child process of a user; returns what it returns, below 256."""
    child = os.fork()
    if child == 0:
        status = 255
        try:
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            status = action()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
