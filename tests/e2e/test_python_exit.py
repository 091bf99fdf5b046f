# SPDX-License-Identifier: MIT OR Apache-2.0
"""How Python programs end that serve disks under load, or wait for their own."""

import errno
import os
import signal
import sys
import textwrap
import threading

import pytest
from support.blockio import SECTOR, Disk
from support.pace import patience
from support.server import Child
from support.waiting import until

RAISING_LOG = """
    import logging
    import ublk

    class Raises(logging.Handler):
        def emit(self, record):
            raise SystemError("a log handler's own mistake")

    logging.getLogger("ublk").addHandler(Raises())

    class Fails(ublk.BlockDevice):
        def read(self, offset, buf):
            if offset == 65536:
                raise ValueError("a mistake")
            buf[:] = bytes(len(buf))

    device = Fails(size=1 << 20).start({options})
    print(device.path, flush=True)
    device.wait()
"""

OWN_DISK = """
    import asyncio, mmap, os, threading
    import ublk

    class Waits(ublk.BlockDevice):
        armed = False

        async def read(self, offset, buf):
            if self.armed and offset == 65536:
                await asyncio.Event().wait()
            buf[:] = bytes(len(buf))

    disk = Waits(size=1 << 20)
    device = disk.start(hang_timeout=1)

    def use():
        descriptor = os.open(device.path, os.O_RDONLY | os.O_DIRECT)
        try:
            os.preadv(descriptor, [mmap.mmap(-1, 4096)], 65536)
        except OSError as error:
            print(error.errno, flush=True)

    disk.armed = True
    print(device.path, flush=True)
    threading.Thread(target=use).start()
    device.wait()
"""


# Stuck at an offset that no probe of udev reads.
STUCK = """
    import sys, threading, time
    import ublk
    from ublk import _lifecycle

    _lifecycle.STOP_SECONDS = 3.0

    class Stuck(ublk.BlockDevice):
        def read(self, offset, buf):
            if offset == 225280:
                print("entered", flush=True)
                time.sleep(3600)
            buf[:] = bytes(len(buf))

    class Pulls(ublk.BlockDevice):
        pass

    kept = []

    def pull():
        for request in device.requests():
            if request.offset == 225280:
                kept.append(request)
                print("entered", flush=True)
                continue
            with request:
                request.buffer[:] = bytes(request.length)

    if {pull}:
        device = Pulls(size=1 << 20).start(pull=True)
        threading.Thread(target=pull, daemon=True).start()
        device.wait_ready()
    else:
        device = Stuck(size=1 << 20).start({options})
    print(device.path, flush=True)
    device.wait()
"""


pytestmark = pytest.mark.io_errors


def program(code: str) -> Child:
    return Child([sys.executable, "-c", textwrap.dedent(code)])


def is_gone(path: str) -> bool:
    return not os.path.exists(path) and not os.path.exists(path.replace("ublkb", "ublkc"))


@pytest.mark.parametrize(
    ("pull", "options", "status"),
    [
        pytest.param(False, "", 1, marks=pytest.mark.long),
        (False, "workers=2", 1),
        pytest.param(True, "", 128 + signal.SIGTERM, marks=pytest.mark.long),
    ],
    ids=["methods", "workers", "kept"],
)
def test_sigterm_removes_a_disk_whose_handler_is_stuck(pull: bool, options: str, status: int) -> None:
    server = program(STUCK.format(pull=pull, options=options))
    path = server.line(60)
    errors: list[int | None] = []

    def use() -> None:
        try:
            with Disk(path, direct=True) as disk:
                disk.read(225280, SECTOR)
        except OSError as error:
            errors.append(error.errno)

    client = threading.Thread(target=use)
    client.start()
    assert server.line(60) == "entered"
    server.signal(signal.SIGTERM)
    assert server.wait(90) == status, server.log
    client.join(patience(60))
    assert errors == [errno.EIO]
    until(lambda: is_gone(path), "the disk is removed", 90)
    server.close()


@pytest.mark.parametrize("options", ["", "workers=2"])
def test_sigterm_under_load_with_a_log_that_raises_leaves_nothing(options: str) -> None:
    server = program(RAISING_LOG.format(options=options))
    path = server.line(60)
    over = threading.Event()

    def load() -> None:
        while not over.is_set():
            try:
                with Disk(path, direct=True) as disk:
                    while not over.is_set():
                        try:
                            disk.read(65536, SECTOR)
                        except OSError as error:
                            # EIO is the handler's; anything else the disk's end.
                            if error.errno != errno.EIO:
                                return
            except OSError:
                return

    clients = [threading.Thread(target=load) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        until(lambda: "a log handler's own mistake" in server.log, "a failed request was logged")
        server.signal(signal.SIGTERM)
        assert server.wait(60) == 128 + signal.SIGTERM, server.log
        until(lambda: is_gone(path), "the device gone")
    finally:
        over.set()
        server.close()
        for client in clients:
            client.join(patience(30))


@pytest.mark.long
def test_tasks_of_a_program_that_waits_for_its_own_disk_let_it_go_on() -> None:
    server = program(OWN_DISK)
    path = server.line(60)
    try:
        assert server.line(60) == str(errno.EIO), server.log
        # The requests fail first.
        until(lambda: "the process waits for its own disk" in server.log, "the reason in the log")
        assert "has it open as descriptor" in server.log
        server.signal(signal.SIGTERM)
        assert server.wait(60) == 128 + signal.SIGTERM, server.log
        until(lambda: is_gone(path), "the device gone")
    finally:
        server.close()
