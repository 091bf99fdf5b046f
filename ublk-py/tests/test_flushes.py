# SPDX-License-Identifier: MIT OR Apache-2.0

"""A flush that failed is never followed by one that succeeds without what was lost."""

import asyncio
import contextlib
import errno
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import ublk
from ublk import _ublk, testing
from ublk._reload import Reloader, Source

SIZE = 1 << 20
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def file(tmp_path):
    with open(tmp_path / "backing", "w+b") as file:
        file.truncate(SIZE)
        yield file


class Once:
    """An `fdatasync` as the kernel's: the first call reports that writes are lost, all others succeed."""

    def __init__(self):
        self.calls = 0

    def __call__(self, file):
        self.calls += 1
        if self.calls == 1:
            raise OSError(errno.EIO, "write-back failed")


class OnceSlowly:
    """An `fdatasync` whose first call, once it may return, reports that writes are lost; all others succeed."""

    def __init__(self):
        self.first, self.entered, self.leave = threading.Lock(), threading.Event(), threading.Event()

    def __call__(self, file):
        if self.first.acquire(blocking=False):
            self.entered.set()
            self.leave.wait(20)
            raise OSError(errno.EIO, "write-back failed")


class Mapped(ublk.BlockDevice):
    def __init__(self, file, sync):
        super().__init__(size=SIZE)
        self.file, self.sync = file, sync

    def map(self, op, offset, length):
        return ublk.Extent(self.file, offset, length, stable=True)

    def flush(self):
        self.sync(self.file)


class Returning(ublk.BlockDevice):
    def __init__(self, file, sync):
        super().__init__(size=SIZE)
        self.file, self.sync = file, sync

    def read(self, offset, buf):
        return ublk.Extent(self.file, offset, len(buf))

    def write(self, offset, buf):
        return ublk.Extent(self.file, offset, len(buf))

    def flush(self):
        self.sync(self.file)


class Tasks(Returning):
    async def write(self, offset, buf):
        return ublk.Extent(self.file, offset, len(buf))

    async def flush(self):
        await asyncio.sleep(0)
        self.sync(self.file)


def with_slow_sync(kind, file, sync):
    """A disk whose sync may block, also where flushes are tasks."""
    disk = kind(file, sync)
    if kind is Tasks:

        async def flush():
            await asyncio.to_thread(sync, file)

        disk.flush = flush
    return disk


def start_flush(driver, number, results):
    """Flush a disk on a thread of its own; append its errno, or 0, to the results."""

    def flush():
        try:
            driver.flush(number)
            results.append(0)
        except OSError as error:
            results.append(error.errno)

    thread = threading.Thread(target=flush)
    thread.start()
    return thread


KINDS = pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Mapped, {"queues": 2}),
        (Mapped, {"workers": 2}),
        (Returning, {"queues": 2}),
        (Returning, {"workers": 2}),
        (Tasks, {"queues": 2}),
    ],
    ids=["map", "map-workers", "return", "return-workers", "tasks"],
)


@KINDS
def test_no_flush_of_extents_succeeds_after_one_that_failed(file, caplog, kind, options):
    with testing.open(kind(file, Once()), **options) as device:
        device.pwrite(0, b"x" * 4096)
        for _ in range(3):
            with pytest.raises(OSError, match="I/O error"):
                device.flush()
        # A disk of which nothing can be trusted any more is still there to be read.
        assert device.pread(0, 4) == b"xxxx"
        device.abort()
    assert len([record for record in caplog.records if "every flush fails" in record.getMessage()]) == 1


@KINDS
def test_no_flush_succeeds_beside_one_that_takes_the_error(driver, file, caplog, kind, options):
    # Both are under way when one of them takes the error that concerns both.
    sync = OnceSlowly()
    device = with_slow_sync(kind, file, sync).start(**options)
    try:
        driver.write(device.id, 0, b"x" * 4096)
        results = []
        threads = [start_flush(driver, device.id, results)]
        assert sync.entered.wait(10)
        # On whatever queue the others come: at least one is free.
        for _ in range(2 if kind is not Tasks and "workers" not in options else 1):
            threads.append(start_flush(driver, device.id, results))
        threads[1].join(0.3)
        assert results == [], "a flush succeeded before the fate of the one beside it was known"
        sync.leave.set()
        for thread in threads:
            thread.join(20)
        assert set(results) == {errno.EIO}
    finally:
        sync.leave.set()
        device.stop(timeout=0)


def test_a_flush_of_a_disk_without_extents_may_be_tried_again(file):
    class Plain(Returning):
        def read(self, offset, buf):
            buf[:] = bytes(len(buf))

        def write(self, offset, buf):
            pass

    with testing.open(Plain(file, Once())) as device:
        device.pwrite(0, b"x" * 4096)
        with pytest.raises(OSError):
            device.flush()
        device.flush()


def all_flushes_fail(driver, device):
    for _ in range(3):
        with pytest.raises(OSError):
            driver.flush(device.id)


@KINDS
def test_a_failed_flush_counts_for_writes_of_the_last_server(driver, file, kind, options):
    old = kind(file, lambda file: None).start(recoverable=True, queues=options.get("queues", 1))
    driver.write(old.id, 0, b"x" * 4096)
    old.quiesce()
    workers = options.get("workers")
    with ublk.recover(old.id, kind(file, Once()), workers=workers) as device:
        all_flushes_fail(driver, device)


@KINDS
def test_flushes_beside_a_failed_one_fail_after_a_recovery(driver, file, kind, options):
    if kind is Tasks or "workers" in options:
        queues, workers = 1, 2
    else:
        queues, workers = 2, None
    old = kind(file, lambda file: None).start(recoverable=True, queues=queues)
    driver.write(old.id, 0, b"x" * 4096)
    old.quiesce()
    sync, results = OnceSlowly(), []
    if kind is Tasks:
        workers = None
    with ublk.recover(old.id, with_slow_sync(kind, file, sync), workers=workers) as device:
        threads = [start_flush(driver, old.id, results) for _ in range(2)]
        try:
            assert sync.entered.wait(20)
            threads[1].join(0.3)
            assert results == []
        finally:
            sync.leave.set()
        for thread in threads:
            thread.join(20)
        assert results == [errno.EIO] * 2
        all_flushes_fail(driver, device)


def test_a_flush_that_fails_before_an_extent_is_seen_counts(driver, file):
    old = Returning(file, lambda file: None).start(recoverable=True)
    old.quiesce()
    with ublk.recover(old.id, Returning(file, Once())) as device:
        with pytest.raises(OSError):
            driver.flush(device.id)
        driver.read(device.id, 0, 4096)
        all_flushes_fail(driver, device)


class Mixed(Returning):
    """Keeps small writes itself."""

    def write(self, offset, buf):
        return ublk.Extent(self.file, offset, len(buf)) if len(buf) > 4096 else None


@pytest.mark.parametrize("failure_first", [False, True])
def test_concurrent_flushes_fail_together_after_a_write_by_the_class(driver, file, failure_first):
    old = Mixed(file, lambda file: None).start(recoverable=True)
    driver.write(old.id, 0, b"x" * 65536)
    old.quiesce()
    fails, entered, leave = threading.Lock(), threading.Semaphore(0), [threading.Event(), threading.Event()]

    def sync(file):
        # The first one takes the error of writes that both cover.
        failing = fails.acquire(blocking=False)
        entered.release()
        leave[not failing].wait(20)
        if failing:
            raise OSError(errno.EIO, "write-back failed")

    errors, threads = [], []
    with ublk.recover(old.id, Mixed(file, sync), workers=2) as device:
        driver.write(device.id, 0, b"x" * 4096)
        try:
            for _ in range(2):
                threads.append(start_flush(driver, device.id, errors))
                assert entered.acquire(timeout=20)
            if failure_first:
                leave[0].set()
                threads[0].join(20)
            else:
                leave[1].set()
                threads[1].join(0.3)
                assert errors == []
        finally:
            for event in leave:
                event.set()
        for thread in threads:
            thread.join(20)
        assert errors == [errno.EIO] * 2
        # The class may retry as long as it returns no extent.
        driver.flush(device.id)
        driver.read(device.id, 0, 4096)
        all_flushes_fail(driver, device)


@pytest.mark.parametrize("workers", [None, 2])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("returned", [None, 4096])
def test_a_recovered_disk_without_extents_may_flush_again(driver, file, workers, asynchronous, returned):
    class Plain(Returning):
        def read(self, offset, buf):
            buf[:] = bytes(len(buf))

        def write(self, offset, buf):
            return returned

    if asynchronous:

        async def write(self, offset, buf):
            return returned

        Plain.write, workers = write, None
    old = Plain(file, lambda file: None).start(recoverable=True)
    old.quiesce()
    with ublk.recover(old.id, Plain(file, Once()), workers=workers) as device:
        driver.write(device.id, 0, b"x" * 4096)
        with pytest.raises(OSError):
            driver.flush(device.id)
        driver.flush(device.id)


@pytest.mark.parametrize("write_first", [False, True])
def test_a_failure_that_the_class_retried_does_not_count_after_a_recovery(driver, write_first):
    class Plain(ublk.BlockDevice):
        sync = Once()

        def read(self, offset, buf):
            buf[:] = bytes(len(buf))

        def write(self, offset, buf):
            pass

        def flush(self):
            self.sync(None)

    disk = Plain(size=SIZE)
    device = disk.start(recoverable=True)
    device.quiesce()
    device = ublk.recover(device.id, disk)
    if write_first:
        driver.write(device.id, 0, bytes(4096))
    with pytest.raises(OSError):
        driver.flush(device.id)
    driver.write(device.id, 0, bytes(4096))
    driver.flush(device.id)
    device.quiesce()
    with ublk.recover(device.id, disk) as device:
        driver.flush(device.id)


def test_a_failure_before_the_first_write_counts_after_another_recovery(driver, file):
    disk = Returning(file, Once())
    device = disk.start(recoverable=True)
    device.quiesce()
    device = ublk.recover(device.id, disk)
    with pytest.raises(OSError):
        driver.flush(device.id)
    device.quiesce()
    with ublk.recover(device.id, disk) as device:
        all_flushes_fail(driver, device)


def test_a_reload_remembers_a_failed_flush(driver, file, tmp_path):
    made = []

    def make():
        made.append(Mapped(file, lambda file: None))
        return made[-1]

    (tmp_path / "source.py").touch()
    first = Mapped(file, Once())
    reloader = Reloader(first, make, Source(tmp_path / "source.py"))
    device = reloader.start()
    try:
        driver.write(device.id, 0, b"x" * 4096)
        with pytest.raises(OSError):
            driver.flush(device.id)
        new = make()
        # As a new version does that syncs by itself.
        new.take_over = lambda old: None
        reloader._replace(new)
        all_flushes_fail(driver, reloader.device)
        assert new._extents is not first._extents
    finally:
        reloader.close()


def test_flushes_side_by_side_succeed(driver, file):
    barrier = threading.Barrier(2, timeout=20)
    disk = Mapped(file, lambda file: barrier.wait())
    with disk.start(workers=2) as device:
        driver.write(device.id, 0, b"x" * 4096)
        threads = [threading.Thread(target=driver.flush, args=[device.id]) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        operations = device.stats().operations
    assert operations["flush"].requests == 2
    assert operations["flush"].errors == 0


@pytest.fixture
def fdatasync(monkeypatch):
    """`_ublk.fdatasync`, which `FileSync` calls, as if the next write-back failed."""
    once = Once()
    monkeypatch.setattr(_ublk, "fdatasync", once)
    return once


def test_a_file_sync_fails_for_ever_once_it_has_failed(file, fdatasync, caplog):
    sync = ublk.FileSync(file)
    assert not sync.failed
    with pytest.raises(OSError, match="write-back failed"):
        sync.sync()
    assert sync.failed
    for _ in range(2):
        with pytest.raises(OSError, match="earlier") as caught:
            sync.sync()
        assert caught.value.errno == errno.EIO
    assert fdatasync.calls == 1
    assert len(caplog.records) == 1


def test_a_file_sync_syncs_all_its_files(file, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(_ublk, "fdatasync", synced.append)
    descriptor = os.open(tmp_path / "index", os.O_RDWR | os.O_CREAT)
    try:
        ublk.FileSync(file, descriptor).sync()
    finally:
        os.close(descriptor)
    assert synced == [file, descriptor]


def test_a_file_sync_that_waits_shares_the_next_sync(file, monkeypatch):
    begun, leave, calls = threading.Semaphore(0), threading.Semaphore(0), []

    def fdatasync(file):
        calls.append(threading.get_ident())
        begun.release()
        assert leave.acquire(timeout=20)

    monkeypatch.setattr(_ublk, "fdatasync", fdatasync)
    sync = ublk.FileSync(file)
    threads = [threading.Thread(target=sync.sync) for _ in range(5)]
    threads[0].start()
    assert begun.acquire(timeout=10)
    for thread in threads[1:]:
        thread.start()
    while sync._waiting < 4:
        threading.Event().wait(0.01)
    leave.release()
    assert begun.acquire(timeout=10)
    assert len(calls) == 2, "one sync at a time"
    leave.release()
    for thread in threads:
        thread.join(20)
    # What was written before any of the four asked is in the one sync that began after they did.
    assert len(calls) == 2


def test_a_file_sync_fails_for_all_that_share_it(file, monkeypatch):
    begun, leave = threading.Event(), threading.Event()

    def fdatasync(file):
        begun.set()
        leave.wait(20)
        raise OSError(errno.EIO, "write-back failed")

    monkeypatch.setattr(_ublk, "fdatasync", fdatasync)
    sync, errors = ublk.FileSync(file), []

    def run():
        try:
            sync.sync()
        except OSError as error:
            errors.append(error.errno)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    leave.set()
    for thread in threads:
        thread.join(20)
    assert errors == [errno.EIO] * 3


# A seccomp filter with which every fdatasync of the process fails.
REFUSED = """
import ctypes, errno, os, platform, signal, struct, sys, tempfile
import ublk
number = {"x86_64": 75, "aarch64": 83}[platform.machine()]
filter = struct.pack("HBBI", 0x20, 0, 0, 0) + struct.pack("HBBI", 0x15, 0, 1, number)
filter += struct.pack("HBBI", 0x06, 0, 0, 0x50000 | int(sys.argv[1])) + struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)
statements = ctypes.create_string_buffer(filter)
program = struct.pack("HxxxxxxP", 4, ctypes.addressof(statements))
libc = ctypes.CDLL(None)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program):
    sys.exit(77)
# One that repeats the call would do so for ever.
signal.alarm(20)
with tempfile.TemporaryFile() as file:
    sync = ublk.FileSync(file)
    for _ in range(2):
        try:
            sync.sync()
        except OSError as error:
            print(errno.errorcode[error.errno])
"""


@pytest.mark.parametrize("name", ["EINTR", "EAGAIN"])
def test_a_file_sync_is_not_repeated(name):
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("the number of the system call is not known")
    command = [sys.executable, "-c", REFUSED, str(getattr(errno, name))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if ended.returncode == 77:
        pytest.skip("no seccomp filters here")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == [name, "EIO"]


class Interrupted(BaseException):
    """What a signal's handler raises."""


def test_a_file_sync_that_a_signal_interrupts_is_over(file):
    def interrupt(*_):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for microseconds in range(1, 200):
            one = ublk.FileSync(file)
            with contextlib.suppress(Interrupted, OSError):
                signal.setitimer(signal.ITIMER_REAL, microseconds / 2e6)
                while True:
                    one.sync()
            assert one._begun == one._ended
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_what_cannot_be_synced_is_a_type_error():
    with pytest.raises(TypeError, match="at least one file"):
        ublk.FileSync()
    with pytest.raises(TypeError, match="fileno"):
        ublk.FileSync("a path")


def load(name):
    spec = importlib.util.spec_from_file_location(f"flush_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["file", "encrypted", "snapshot"])
def test_no_flush_of_an_example_succeeds_after_a_failure(tmp_path, fdatasync, name):
    if name == "encrypted":
        pytest.importorskip("cryptography")
    path, key = tmp_path / "image", tmp_path / "key"
    path.write_bytes(bytes(SIZE))
    key.write_bytes(bytes(range(64)))
    example = load(name)
    make = {
        "file": lambda: example.FileDisk(path),
        "encrypted": lambda: example.Encrypted(path, key),
        "snapshot": lambda: example.Snapshot(path, tmp_path / "changes"),
    }
    with testing.open(make[name]()) as device:
        # That of the snapshot syncs by itself, and takes the error then.
        with contextlib.suppress(OSError):
            device.pwrite(0, b"x" * 4096)
        for _ in range(2):
            with pytest.raises(OSError):
                device.flush()
        device.abort()


def test_a_stop_fails_a_flush_that_waits_for_a_stuck_one(driver, file):
    first, entered, leave = threading.Lock(), threading.Event(), threading.Event()

    def sync(file):
        if first.acquire(blocking=False):
            entered.set()
            leave.wait(30)

    device = Mapped(file, sync).start(workers=2)
    driver.write(device.id, 0, bytes(4096))
    errors = []

    def flush():
        try:
            driver.flush(device.id)
        except OSError as error:
            errors.append(error.errno)

    threads = [threading.Thread(target=flush) for _ in range(2)]
    threads[0].start()
    assert entered.wait(10)
    threads[1].start()
    device.stop(cancel=True)
    assert driver.devices() == []
    for thread in threads:
        thread.join(10)
    assert set(errors) <= {errno.EIO, errno.ENODEV}
    assert len(errors) == 2
    leave.set()


def test_a_flush_that_a_stop_has_failed_holds_up_none_later(driver, file):
    first, entered, leave = threading.Lock(), threading.Event(), threading.Event()

    def sync(file):
        if first.acquire(blocking=False):
            entered.set()
            leave.wait(60)

    disk = Mapped(file, sync)
    device = disk.start(workers=1)
    driver.write(device.id, 0, bytes(4096))
    errors = []

    def flush(id):
        try:
            driver.flush(id)
        except OSError as error:
            errors.append(error.errno)

    stuck = threading.Thread(target=flush, args=[device.id])
    stuck.start()
    assert entered.wait(10)
    device.stop(cancel=True)
    stuck.join(10)
    with disk.start(workers=1) as device:
        later = threading.Thread(target=flush, args=[device.id], daemon=True)
        later.start()
        later.join(20)
        was_over = not later.is_alive()
        leave.set()
        later.join(10)
    assert was_over, "it waits for a flush whose request is no more"
    # What that has not synced may be lost.
    assert errors[-1] == errno.EIO
