# SPDX-License-Identifier: MIT OR Apache-2.0

"""What a handler does, and what its request's client sees."""

import asyncio
import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import numpy
import pytest

import ublk
from ublk import testing

SIZE = 1 << 20


class Ram(ublk.BlockDevice):
    """A RAM disk with every operation, which writes down its calls."""

    def __init__(self, size=SIZE, **shape):
        super().__init__(size=size, **shape)
        self.data = bytearray(size)
        self.calls = []

    def read(self, offset, buf):
        buf[:] = self.data[offset : offset + len(buf)]

    def write(self, offset, buf):
        self.data[offset : offset + len(buf)] = buf

    def flush(self):
        self.calls.append(("flush",))

    def discard(self, offset, length):
        self.calls.append(("discard", offset, length))

    def write_zeroes(self, offset, length):
        self.calls.append(("write_zeroes", offset, length))
        self.data[offset : offset + length] = bytes(length)


def reader(function):
    """Make a disk whose `read` is the given function of (offset, buf)."""

    class Reader(ublk.BlockDevice):
        def read(self, offset, buf):
            return function(offset, buf)

        def write(self, offset, buf):
            return function(offset, buf)

    return Reader(size=SIZE)


def test_reads_return_what_was_written(driver):
    with Ram().start(queues=2, depth=4) as dev:
        driver.write(dev.id, 8192, b"x" * 12288)
        assert driver.read(dev.id, 4096, 16384) == b"\0" * 4096 + b"x" * 12288


def test_every_operation_reaches_its_method(driver):
    disk = Ram()
    with disk.start() as dev:
        driver.flush(dev.id)
        driver.discard(dev.id, 4096, 8192)
        driver.write_zeroes(dev.id, 512, 1024)
    assert disk.calls == [("flush",), ("discard", 4096, 8192), ("write_zeroes", 512, 1024)]


def test_a_read_buffer_is_writable_and_a_write_buffer_is_not(driver):
    seen = []

    class Disk(ublk.BlockDevice):
        def read(self, offset, buf):
            seen.append((buf.readonly, len(buf), buf.format, buf.contiguous))
            buf[:] = bytes(len(buf))

        def write(self, offset, buf):
            seen.append((buf.readonly, len(buf), buf.format, buf.contiguous))
            with pytest.raises(TypeError):
                buf[0] = 1

    with Disk(size=SIZE).start() as dev:
        driver.read(dev.id, 0, 512)
        driver.write(dev.id, 0, bytes(4096))
    assert seen == [(False, 512, "B", True), (True, 4096, "B", True)]


@pytest.mark.parametrize(
    ("exception", "expected"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (PermissionError(errno.EPERM, "no"), errno.EPERM),
        (NotImplementedError(), errno.EOPNOTSUPP),
        (TimeoutError(), errno.ETIMEDOUT),
        (MemoryError(), errno.ENOMEM),
    ],
)
def test_an_exception_that_is_an_errno_becomes_that_errno(driver, caplog, exception, expected):
    def fail(offset, buf):
        raise exception

    with reader(fail).start() as dev, pytest.raises(OSError) as caught:
        driver.read(dev.id, 0, 512)
    assert caught.value.errno == expected
    assert caplog.records == []


@pytest.mark.parametrize(
    ("number", "expected"),
    # Those that the C library has no name for; ENOTSUPP and ERESTARTSYS, of the kernel alone; HTTP's.
    [
        (41, errno.EIO),
        (134, errno.EIO),
        (503, errno.EIO),
        (4095, errno.EIO),
        (524, errno.EOPNOTSUPP),
        (512, errno.EINTR),
    ],
)
def test_an_errno_of_any_number_fails_the_request(driver, number, expected):
    class Failing(Ram):
        def fail(self, *_):
            raise OSError(number, "it says")

        read = write = flush = discard = write_zeroes = fail

    with Failing().start() as dev:
        calls = [
            lambda: driver.read(dev.id, 0, 4096),
            lambda: driver.write(dev.id, 0, bytes(4096)),
            lambda: driver.flush(dev.id),
            lambda: driver.discard(dev.id, 0, 4096),
            lambda: driver.write_zeroes(dev.id, 0, 4096),
        ]
        for call in calls:
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == expected


@pytest.mark.parametrize("exception", [ValueError("odd"), OSError("without errno"), KeyError(1)])
def test_any_other_exception_is_eio_with_its_traceback_in_the_log(driver, caplog, exception):
    def fail(offset, buf):
        if offset:
            raise exception

    with reader(fail).start() as dev:
        with pytest.raises(OSError) as caught:
            driver.read(dev.id, 4096, 512)
        assert caught.value.errno == errno.EIO
        driver.read(dev.id, 0, 512)
    [record] = [r for r in caplog.records if r.name == "ublk"]
    assert record.levelno == logging.ERROR
    assert record.exc_info[1] is exception
    assert "Reader.read" in record.getMessage()


@pytest.mark.parametrize("returned", [b"data", 511, 0, "x", 1.5])
def test_a_wrong_return_value_is_eio_and_says_what_was_expected(driver, caplog, returned):
    with reader(lambda offset, buf: returned).start() as dev, pytest.raises(OSError) as caught:
        driver.read(dev.id, 0, 512)
    assert caught.value.errno == errno.EIO
    assert "must return None" in caplog.text or "the request has 512 bytes" in caplog.text


def test_the_number_of_bytes_may_be_returned(driver):
    with reader(lambda offset, buf: len(buf)).start() as dev:
        driver.read(dev.id, 0, 4096)


def test_a_kept_view_raises_afterwards(driver):
    kept = []
    with reader(lambda offset, buf: kept.append(buf)).start() as dev:
        driver.read(dev.id, 0, 512)
        with pytest.raises(ValueError, match="released"):
            kept[0][0]


def test_the_object_behind_a_view_gives_no_new_views(driver):
    kept = []
    with reader(lambda offset, buf: kept.append(buf.obj)).start() as dev:
        driver.read(dev.id, 0, 512)
        with pytest.raises(BufferError, match="has ended"):
            memoryview(kept[0])


@pytest.mark.parametrize("keep", ["slice", "cast", "numpy"])
def test_memory_that_is_kept_never_sees_another_request(driver, keep):
    kept = []

    def hold(offset, buf):
        if keep == "slice":
            kept.append(buf[16:32])
        elif keep == "cast":
            kept.append(buf.cast("Q"))
        else:
            kept.append(numpy.frombuffer(buf, dtype=numpy.uint8))

    with reader(hold).start(depth=1) as dev:
        for value in range(8):
            driver.write(dev.id, 0, bytes([value]) * 4096)
    for value, view in enumerate(kept):
        assert set(bytes(view)) == {value}


def test_a_read_whose_buffer_is_kept_still_returns_its_data(driver):
    kept = []

    def hold(offset, buf):
        buf[:] = bytes([offset // 4096]) * len(buf)
        kept.append(buf[:1])

    with reader(hold).start(depth=1) as dev:
        for block in range(5):
            assert driver.read(dev.id, block * 4096, 4096) == bytes([block]) * 4096
    assert [bytes(view) for view in kept] == [bytes([block]) for block in range(5)]


def test_the_interpreter_ends_a_device_whose_handler_exits(driver):
    def leave(offset, buf):
        raise SystemExit(3)

    with reader(leave).start() as dev:
        with pytest.raises(OSError):
            driver.read(dev.id, 0, 512)
        with pytest.raises(SystemExit) as caught:
            dev.wait(10)
        assert caught.value.code == 3


def test_queues_are_served_by_threads_of_their_own(driver):
    names = set()
    together = threading.Barrier(2, timeout=10)

    def meet(offset, buf):
        names.add(threading.current_thread().name)
        together.wait()

    with reader(meet).start(queues=2, depth=1) as dev:
        clients = [threading.Thread(target=driver.read, args=(dev.id, n * 4096, 512)) for n in range(2)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(10)
    assert names == {f"ublk{dev.id}q0", f"ublk{dev.id}q1"}


def test_a_finished_request_does_not_wait_for_a_slow_one_behind_it(driver):
    release = threading.Event()
    started = threading.Event()

    def slow(offset, buf):
        if offset == 0:
            started.set()
            release.wait(10)
        elif offset == 8192:
            time.sleep(1)
        else:
            time.sleep(0.05)

    with reader(slow).start(depth=8) as dev:
        ends = {}

        def read(offset):
            driver.read(dev.id, offset, 512)
            ends[offset] = time.monotonic()

        clients = [threading.Thread(target=read, args=(offset,)) for offset in (0, 4096, 8192)]
        clients[0].start()
        assert started.wait(10)
        for client in clients[1:]:
            client.start()
            time.sleep(0.1)
        release.set()
        for client in clients:
            client.join(10)
    assert ends[8192] - ends[4096] > 0.5


def test_a_handler_cannot_wait_for_its_own_device(driver):
    raised = []

    class Suicidal(ublk.BlockDevice):
        def read(self, offset, buf):
            try:
                self.dev.stop()
            except RuntimeError as error:
                raised.append(str(error))

    disk = Suicidal(size=SIZE)
    with disk.start() as disk.dev:
        driver.read(disk.dev.id, 0, 512)
    assert "raise SystemExit instead" in raised[0]


@pytest.mark.parametrize("options", [{}, {"workers": 2}], ids=["plain", "workers"])
def test_a_mistake_is_logged_with_its_traceback(caplog, options):
    class Mistaken(ublk.BlockDevice):
        def read(self, offset, buf):
            self.helper()

        def helper(self):
            return {}[0]

    with testing.open(Mistaken(size=1 << 20), **options) as device, pytest.raises(OSError):
        device.pread(0, 512)
    assert "in helper" in caplog.text


class Half(ublk.BlockDevice):
    """Fills the first half of what is read, in each style."""

    def read(self, offset, buf):
        buf[: len(buf) // 2] = b"x" * (len(buf) // 2)

    def write(self, offset, buf):
        pass


class HalfInBatches(ublk.BlockDevice):
    operations = ("read", "write")

    def handle(self, requests):
        for request in requests:
            if str(request.op) == "read" and request.offset < 8192:
                request.buffer[: request.length // 2] = b"x" * (request.length // 2)
            request.complete()


@pytest.mark.parametrize("disk", [Half, HalfInBatches])
def test_bytes_left_unwritten_are_no_other_requests(driver, disk):
    with disk(size=SIZE).start(depth=1) as dev:
        for _ in range(3):
            driver.write(dev.id, 0, b"secret! " * 512)
            # Where the kernel's clients get zeros, those of the stand-in driver see it.
            assert driver.read(dev.id, 0, 4096) == b"x" * 2048 + b"\xa5" * 2048


def test_a_read_that_is_completed_unseen_has_no_other_requests_bytes(driver):
    with HalfInBatches(size=SIZE).start(depth=1) as dev:
        driver.write(dev.id, 0, b"secret! " * 512)
        assert driver.read(dev.id, 8192, 4096) == b"\xa5" * 4096


class Forks(ublk.BlockDevice):
    def read(self, offset, buf):
        buf[:] = b"r" * len(buf)
        self.fork()

    def fork(self):
        self.child = os.fork()


class ForksInTasks(Forks):
    async def read(self, offset, buf):
        super().read(offset, buf)


class ForksInBatches(Forks):
    read = ublk.BlockDevice.read

    def handle(self, requests):
        self.fork()
        for request in requests:
            with request:
                request.buffer[:] = b"r" * request.length


@pytest.mark.parametrize(
    ("kind", "options"),
    [(Forks, {}), (Forks, {"workers": 1}), (ForksInTasks, {}), (ForksInBatches, {})],
    ids=["methods", "workers", "tasks", "batches"],
)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_that_returns_from_a_handler_ends(driver, kind, options):
    disk = kind(size=SIZE)
    with disk.start(**options) as device:
        assert driver.read(device.id, 0, 512) == b"r" * 512
        deadline = time.monotonic() + 90
        while (ended := os.waitpid(disk.child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        if ended == (0, 0):
            os.kill(disk.child, signal.SIGKILL)
            os.waitpid(disk.child, 0)
        assert os.waitstatus_to_exitcode(ended[1]) == 1
        assert ended[0] == disk.child, "the child serves the disk, too"
        # The parent's disk works as before.
        assert driver.read(device.id, 512, 512) == b"r" * 512
        os.waitpid(disk.child, 0)


def end_of_child(child):
    """The exit status of a child, which is killed if it does not end."""
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


async def wait_in_turns():
    while True:
        await asyncio.sleep(0)


async def raise_(exception):
    raise exception


@pytest.mark.parametrize(
    "leave",
    [
        lambda: raise_(OSError(errno.ENOENT, "exec failed")),
        lambda: raise_(SystemExit(0)),
        lambda: raise_(asyncio.CancelledError()),
        lambda: raise_(GeneratorExit()),
        wait_in_turns,
    ],
    ids=["error", "exit", "cancelled", "closed", "waits"],
)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_serves_no_requests_of_its_parent(driver, tmp_path, leave):
    entered, go = threading.Event(), threading.Event()

    class ForksOnce(ublk.BlockDevice):
        child = -1

        async def read(self, offset, buf):
            entered.set()
            go.wait(20)

        async def write(self, offset, buf):
            # One that waits when the other one forks, and others that are taken with it.
            await asyncio.sleep(0.1 if offset == 4096 else 0)
            if offset == 0 and self.child < 0:
                self.child = os.fork()
                if self.child == 0:
                    await leave()
            with open(tmp_path / "servers", "a") as log:
                print(os.getpid(), file=log)

    disk = ForksOnce(size=SIZE)
    with disk.start() as device:
        threads = [threading.Thread(target=driver.read, args=[device.id, 0, 512])]
        threads[0].start()
        assert entered.wait(20)
        for offset in (4096, 0, 8192, 12288):
            threads.append(threading.Thread(target=driver.write, args=[device.id, offset, bytes(512)]))
            threads[-1].start()
            time.sleep(0.02)
        go.set()
        for thread in threads:
            thread.join(20)
        assert end_of_child(disk.child) == 1
        # The reader of the loop still works.
        driver.write(device.id, 0, bytes(512))
    assert (tmp_path / "servers").read_text().split() == [str(os.getpid())] * 5


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("is_running", [True, False])
def test_a_forked_child_cannot_continue_the_loop_of_a_device(driver, is_running):
    async def main():
        async with await ForksInTasks(size=SIZE).start_async() as device:
            if not is_running:
                await device.stop_async()
            child = os.fork()
            if child == 0:
                await asyncio.sleep(0)
                os._exit(7)
            assert end_of_child(child) == (1 if is_running else 7)

    asyncio.run(main())


DROPS_THE_LOOP = """
import asyncio, gc, multiprocessing, os
import ublk
from ublk._driver import using
from ublk._ublk import FakeDriver

class Disk(ublk.BlockDevice):
    async def read(self, offset, buf):
        pass

class App:
    # Runs its loop now and then.
    def __init__(self):
        self.loop = asyncio.new_event_loop()
        with using(FakeDriver()):
            self.device = self.loop.run_until_complete(Disk(size=1 << 20).start_async())

def work(apps):
    apps.clear()
    gc.collect()
    print("done", flush=True)

apps = [App()]
worker = multiprocessing.get_context("fork").Process(target=work, args=[apps])
worker.start()
worker.join(60)
print(worker.exitcode, flush=True)
os._exit(0)
"""


def test_a_forked_child_may_drop_the_loop_of_its_parents_device():
    ended = subprocess.run([sys.executable, "-c", DROPS_THE_LOOP], capture_output=True, text=True, timeout=120)
    assert ended.stdout.split() == ["done", "0"], ended.stderr


INTERRUPTED_FORK = """
import asyncio, ctypes, functools, os, signal, threading
import ublk
from ublk._driver import using
from ublk._ublk import FakeDriver

# A signal whose handler raises, while fork hooks run. Not sent by Python code, which the handler would interrupt.
signal.signal(signal.SIGUSR1, signal.default_int_handler)
os.register_at_fork(after_in_child=functools.partial(getattr(ctypes.CDLL(None), "raise"), signal.SIGUSR1))

class Disk(ublk.BlockDevice):
    async def read(self, offset, buf):
        children.append(os.fork())
        if children[-1]:
            threading.Timer(40, os.kill, [children[-1], signal.SIGKILL]).start()

async def main():
    with using(driver):
        async with await Disk(size=1 << 20).start_async() as device:
            await asyncio.to_thread(driver.read, device.id, 0, 512)
            status = await asyncio.to_thread(os.waitpid, children[0], 0)
            print("child:", os.waitstatus_to_exitcode(status[1]), flush=True)
            os._exit(0)

children, driver = [], FakeDriver()
asyncio.run(main())
"""


def test_a_signal_during_a_fork_does_not_let_the_child_serve():
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED_FORK], capture_output=True, text=True, timeout=120)
    assert ended.stdout == "child: 1\n", ended.stderr
    assert "a child process" in ended.stderr


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_cannot_take_requests_of_its_parent(driver):
    class Pulls(ublk.BlockDevice):
        pass

    def serve():
        for request in device.requests():
            with request:
                if request.op == "write":
                    children.append(os.fork())
                    if children[-1] == 0:
                        # The `with` statement suppresses it.
                        raise OSError(errno.ENOENT, "exec failed")

    def serve_in_process():
        own = os.getpid()
        try:
            serve()
        except RuntimeError:
            os._exit(7 if os.getpid() != own else 1)

    children = []
    with Pulls(size=SIZE).start(pull=True) as device:
        server = threading.Thread(target=serve_in_process)
        server.start()
        device.wait_ready()
        driver.write(device.id, 0, bytes(512))
        assert end_of_child(children[0]) == 7
        driver.read(device.id, 0, 512)
    server.join(20)
