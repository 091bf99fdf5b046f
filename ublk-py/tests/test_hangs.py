# SPDX-License-Identifier: MIT OR Apache-2.0

"""Handlers that hang are reported with their stacks."""

import asyncio
import os
import threading
import time

import pytest
from support import until

import ublk
from ublk import _own_disk, _watchdog

SIZE = 1 << 20


class Plain(ublk.BlockDevice):
    def __init__(self):
        super().__init__(size=SIZE)
        self.go = threading.Event()

    def read(self, offset, buf):
        self.wait_for_the_far_end()

    def wait_for_the_far_end(self):
        self.go.wait(20)


class Batch(Plain):
    read = ublk.BlockDevice.read

    def handle(self, requests):
        self.wait_for_the_far_end()
        for request in requests:
            request.complete()


class Tasks(Plain):
    async def read(self, offset, buf):
        while not self.go.is_set():
            await self.wait_for_the_far_end()

    async def wait_for_the_far_end(self):
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("disk", "options"),
    [(Plain, {}), (Plain, {"workers": 2}), (Batch, {}), (Tasks, {})],
    ids=["plain", "workers", "batch", "tasks"],
)
def test_a_handler_that_hangs_is_reported_once(driver, caplog, disk, options):
    disk = disk()
    with disk.start(hang_timeout=0.1, **options) as device:
        client = threading.Thread(target=driver.read, args=[device.id, 0, 512])
        client.start()
        until(lambda: caplog.records)
        time.sleep(0.3)
        disk.go.set()
        client.join(10)
    assert len(caplog.records) == 1, caplog.text
    assert "wait_for_the_far_end" in caplog.text
    assert "/nonexistent/ublkb0" in caplog.text


@pytest.mark.parametrize("waited", [False, True], ids=["at once", "after a wait"])
def test_a_coroutine_that_blocks_its_loop_is_reported_with_what_it_is_at(driver, caplog, waited):
    go = threading.Event()

    class Blocking(ublk.BlockDevice):
        async def read(self, offset, buf):
            if waited:
                await asyncio.sleep(0)
            self.block_the_loop()

        def block_the_loop(self):
            go.wait(10)

    with Blocking(size=SIZE).start(hang_timeout=0.1) as device:
        client = threading.Thread(target=driver.read, args=[device.id, 0, 512])
        client.start()
        until(lambda: "block_the_loop" in caplog.text)
        go.set()
        client.join(10)
    assert "block_the_loop" in caplog.text
    assert caplog.text.index("in read") < caplog.text.index("in block_the_loop")


def test_a_handler_that_is_only_busy_is_not_reported(driver, caplog):
    class Busy(ublk.BlockDevice):
        def read(self, offset, buf):
            time.sleep(0.05)

    with Busy(size=SIZE).start(hang_timeout=1) as device:
        for _ in range(24):
            driver.read(device.id, 0, 512)
    assert [record for record in caplog.records if record.name == "ublk"] == []


def test_who_does_not_want_reports_gets_none(driver, caplog):
    disk = Plain()
    with disk.start(hang_timeout=None) as device:
        client = threading.Thread(target=driver.read, args=[device.id, 0, 512])
        client.start()
        time.sleep(0.3)
        disk.go.set()
        client.join(10)
    assert [record for record in caplog.records if record.name == "ublk"] == []


def test_a_wait_of_no_time_is_a_value_error():
    with pytest.raises(ValueError, match="hang_timeout"):
        Plain().start(hang_timeout=0)


# The number of the call, its six arguments, the stack pointer and the program counter.
PREADV = "295 {:#x} 0x7f3fe9333000 0x1 0x10000 0x0 0x0 0x7ffc1dc4ac48 0x7f3fe94af2ad"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """What /proc says of a process that has a partition of its own disk open, and a thread that waits for it."""
    for directory in ("fd", "fdinfo", "task/7", "task/8"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "fd" / "3").symlink_to("/nonexistent/ublkb0p1")
    (tmp_path / "fd" / "4").symlink_to("/nonexistent/ublkb01")
    (tmp_path / "task/7/stat").write_text("7 (a ) D name) S 1 1")
    (tmp_path / "task/8/stat").write_text("8 (client) D 1 1")
    (tmp_path / "task/8/syscall").write_text(PREADV.format(3))
    monkeypatch.setattr(_own_disk, "_PROCESS", tmp_path)
    return tmp_path


def test_a_program_that_has_its_own_disk_open_is_warned_once(driver, caplog, own):
    with Plain().start(hang_timeout=0.05):
        until(lambda: caplog.records)
        time.sleep(0.2)
    (record,) = caplog.records
    assert "has it open as descriptor 3 (/nonexistent/ublkb0p1): if it" in record.getMessage()


def test_files_on_the_own_disk_are_its_own_too(own, monkeypatch):
    monkeypatch.setattr(_own_disk, "_disk_of", {"259:1": "ublkb0", "8:1": "sda"}.get)
    (own / "mountinfo").write_text("22 1 8:1 / / rw\n41 22 259:1 / /mnt rw\n")
    (own / "fd" / "5").symlink_to("/mnt/file")
    for descriptor, mount in (("3", 22), ("4", 22), ("5", 41)):
        (own / "fdinfo" / descriptor).write_text(f"pos:\t0\nmnt_id:\t{mount}\n")
    assert _own_disk.own_descriptors("/dev/ublkb0") == {5: "/mnt/file"}


def test_tasks_of_a_program_that_waits_for_its_own_disk_fail_their_requests(driver, caplog, own):
    class Waits(ublk.BlockDevice):
        async def read(self, offset, buf):
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

    cancelled = threading.Event()
    with Waits(size=SIZE).start(hang_timeout=0.1) as device:
        with pytest.raises(OSError, match="I/O error"):
            driver.read(device.id, 0, 512)
        assert cancelled.wait(10)
        until(lambda: "the process waits for its own disk" in caplog.text)
    assert "thread (8) cannot continue" in caplog.text
    assert "failing 1 of their requests" in caplog.text


def test_a_handler_that_hangs_while_the_own_disk_is_used_is_named_with_the_cycle(driver, caplog, own):
    disk = Plain()
    with disk.start(hang_timeout=0.1) as device:
        client = threading.Thread(target=driver.read, args=[device.id, 0, 512])
        client.start()
        until(lambda: "the process waits for its own disk" in caplog.text)
        disk.go.set()
        client.join(10)
    assert "failing 0 of their requests" in caplog.text


@pytest.mark.parametrize(
    "syscall",
    [PREADV.format(9), PREADV.format(4), "-1 0x7ffc1dc4ac48 0x7f3fe94af2ad", "running", "", None],
    ids=["another file", "another disk", "page fault", "running", "empty", "unreadable"],
)
def test_a_thread_that_waits_for_another_disk_fails_no_request(driver, caplog, own, syscall):
    if syscall is None:
        (own / "task/8/syscall").unlink()
    else:
        (own / "task/8/syscall").write_text(syscall)

    class Waits(ublk.BlockDevice):
        async def read(self, offset, buf):
            while not go.is_set():
                await asyncio.sleep(0.01)
            buf[:] = bytes(len(buf))

    go = threading.Event()
    with Waits(size=SIZE).start(hang_timeout=0.05) as device:
        client = threading.Thread(target=driver.read, args=[device.id, 0, 512])
        client.start()
        until(lambda: "a task has had a request" in caplog.text)
        # The watchdog looks several times.
        time.sleep(0.3)
        go.set()
        client.join(10)
        assert device.stats().operations["read"].errors == 0
    assert "waits for its own disk" not in caplog.text


def test_the_descriptor_of_a_call_is_its_first_argument():
    reader, writer = os.pipe()
    thread = threading.Thread(target=os.read, args=[reader, 1])
    thread.start()
    try:
        until(lambda: _own_disk.descriptor_in_use(thread.native_id) == reader)
    finally:
        os.write(writer, b"x")
        thread.join(10)
        os.close(reader)
        os.close(writer)
    assert _own_disk.descriptor_in_use(thread.native_id) is None


def test_an_object_that_cannot_be_looked_at_does_not_end_the_watchdog(driver, caplog):
    class Odd:
        def __await__(self):
            return self

        def __iter__(self):
            return self

        def __next__(self):
            if go.is_set():
                raise StopIteration

        def __getattr__(self, name):
            raise RuntimeError(name)

    class Tasks(ublk.BlockDevice):
        async def read(self, offset, buf):
            await Odd()
            buf[:] = bytes(len(buf))

    go = threading.Event()
    with Tasks(size=SIZE).start(hang_timeout=0.1) as device:
        client = threading.Thread(target=driver.read, args=[device.id, 0, 512])
        client.start()
        until(lambda: "await Odd()" in caplog.text)
        go.set()
        client.join(10)
    assert _watchdog._thread.is_alive()


def test_a_look_that_fails_is_not_the_last_one(driver, caplog, monkeypatch):
    disk = Plain()
    with disk.start(hang_timeout=0.05) as device:
        monkeypatch.setattr(_watchdog, "own_descriptors", lambda path: 1 / 0)
        until(lambda: "checking its handlers failed" in caplog.text)
        monkeypatch.setattr(_watchdog, "own_descriptors", lambda path: {})
        client = threading.Thread(target=driver.read, args=[device.id, 0, 512])
        client.start()
        until(lambda: "a handler has run" in caplog.text)
        disk.go.set()
        client.join(10)
