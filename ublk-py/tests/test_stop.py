# SPDX-License-Identifier: MIT OR Apache-2.0

"""How long a stop waits for handlers, and who may ask for one."""

import asyncio
import concurrent.futures
import contextlib
import errno
import threading
import time

import pytest
from support import recover_when_free, until

import ublk
from ublk import _lifecycle, _start, testing

SIZE = 1 << 20
# More than a stop takes that waits for nothing, and less than one that waits.
SOON = 15


class Stuck(ublk.BlockDevice):
    def __init__(self):
        super().__init__(size=SIZE)
        self.entered, self.leave = threading.Event(), threading.Event()

    def read(self, offset, buf):
        self.entered.set()
        self.leave.wait()


class Waits(ublk.BlockDevice):
    """Coroutines that wait for what never comes."""

    def __init__(self):
        super().__init__(size=SIZE)
        self.entered, self.cancelled = threading.Event(), threading.Event()

    async def read(self, offset, buf):
        self.entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


@contextlib.contextmanager
def client(driver, device, disk):
    """A client whose request a handler has."""
    errors = []

    def read():
        try:
            driver.read(device.id, 0, 512)
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    assert disk.entered.wait(10)
    yield errors
    thread.join(20)
    assert not thread.is_alive()


def test_a_stop_waits_for_a_stuck_method_no_longer_than_asked(driver):
    disk = Stuck()
    device = disk.start()
    with client(driver, device, disk):
        begin = time.monotonic()
        with pytest.raises(ublk.UblkError) as caught:
            device.stop(timeout=0.1)
        assert time.monotonic() - begin < SOON
        assert caught.value.errno == errno.ETIMEDOUT
        disk.leave.set()
        with contextlib.suppress(ublk.UblkError):
            device.stop()
    assert not device.running
    assert driver.devices() == []


@pytest.mark.parametrize("cancel", [False, True])
def test_a_stop_takes_requests_from_stuck_workers(driver, cancel):
    disk = Stuck()
    device = disk.start(workers=2)
    with client(driver, device, disk) as errors:
        stop_failing_one(device, cancel)
    assert [error.errno for error in errors] == [errno.EIO]
    assert driver.devices() == []
    disk.leave.set()
    device.stop()


def test_a_worker_s_view_outlives_a_request_that_was_taken_back(driver):
    class Writes(Stuck):
        def read(self, offset, buf):
            super().read(offset, buf)
            buf[:] = b"l" * len(buf)
            self.done.set()

    disk = Writes()
    disk.done = threading.Event()
    device = disk.start(workers=1)
    with client(driver, device, disk):
        stop_failing_one(device, cancel=False)
    disk.leave.set()
    # Into memory of its own.
    assert disk.done.wait(10)


def test_a_start_that_cannot_be_undone_is_undone_at_exit(driver, monkeypatch):
    disk, readers = Stuck(), []

    def read(id):
        with contextlib.suppress(OSError):
            driver.read(id, 0, 512)

    def interrupted(device):
        readers.append(threading.Thread(target=read, args=[device.id]))
        readers[0].start()
        assert disk.entered.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr(_start, "_register", interrupted)
    monkeypatch.setattr(_lifecycle, "STOP_SECONDS", 0.1)
    before = set(_lifecycle.running)
    with pytest.raises(ublk.UblkError) as caught:
        disk.start()
    assert caught.value.errno == errno.ETIMEDOUT
    (device,) = _lifecycle.running - before
    assert device._is_hung()
    disk.leave.set()
    readers[0].join(20)
    with contextlib.suppress(ublk.UblkError):
        device.stop()
    assert device not in _lifecycle.running


class Pulls(Stuck):
    read = ublk.BlockDevice.read


@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("looks", [True, False], ids=["looked", "unseen"])
def test_a_stop_takes_kept_requests_back(driver, cancel, looks):
    disk, kept = Pulls(), []

    def pull():
        for request in device.requests():
            kept.append((request, request.buffer if looks else None))
            disk.entered.set()

    device = disk.start(pull=True)
    thread = threading.Thread(target=pull)
    thread.start()
    device.wait_ready(10)
    with client(driver, device, disk) as errors:
        stop_failing_one(device, cancel)
    thread.join(10)
    assert [error.errno for error in errors] == [errno.EIO]
    assert driver.devices() == []
    ((request, buffer),) = kept
    assert request.done
    with pytest.raises(ValueError, match="the request has ended"):
        request.complete()
    if looks:
        with pytest.raises(ValueError, match="released"):
            buffer[0]


class StuckWrite(ublk.BlockDevice):
    """Its first write takes until it is let go, and lands late."""

    def __init__(self, data):
        super().__init__(size=SIZE)
        self.data = data
        self.entered, self.leave = threading.Event(), threading.Event()

    def read(self, offset, buf):
        buf[:] = self.data[offset : offset + len(buf)]

    def write(self, offset, buf):
        if not self.entered.is_set():
            self.entered.set()
            self.leave.wait()
        self.data[offset : offset + len(buf)] = buf


def test_a_device_is_not_handed_over_while_a_method_may_still_write(driver):
    """The next server's data, which is acknowledged, would be overwritten."""
    data = bytearray(SIZE)
    disk = StuckWrite(data)
    device = disk.start(workers=2, recoverable=True)

    def act(function, *arguments):
        def body():
            with contextlib.suppress(OSError):
                function(*arguments)

        thread = threading.Thread(target=body)
        thread.start()
        return thread

    writer = act(driver.write, device.id, 0, b"old " * 128)
    assert disk.entered.wait(10)
    leaver = act(device.quiesce)
    while device.running:
        time.sleep(0.01)
    # As a second Ctrl-C does.
    device._native.expedite()
    for _ in range(20):
        with pytest.raises(OSError) as raised:
            ublk.recover(device.id, StuckWrite(data))
        assert raised.value.errno == errno.EBUSY
        time.sleep(0.05)
    disk.leave.set()
    writer.join(30)
    # Then another one may come.
    recover_when_free(device.id, StuckWrite(data)).stop()
    leaver.join(60)


def test_a_stop_fails_requests_that_are_not_taken(driver):
    disk, leave = Pulls(), threading.Event()

    def pull():
        for request in device.requests():
            with request:
                disk.entered.set()
            # The other one waits.
            leave.wait(30)

    device = disk.start(pull=True)
    thread = threading.Thread(target=pull)
    thread.start()
    device.wait_ready(10)
    with client(driver, device, disk) as first, client(driver, device, disk) as second:
        stop_failing_one(device, cancel=False)
    leave.set()
    thread.join(10)
    assert [error.errno for error in first + second] == [errno.EIO]
    assert driver.devices() == []


def test_a_stop_takes_requests_of_a_batch_back(driver):
    class Keeps(Pulls):
        def handle(self, requests):
            self.kept = requests
            self.entered.set()

    disk = Keeps()
    device = disk.start()
    with client(driver, device, disk) as errors:
        stop_failing_one(device, cancel=False)
    assert [error.errno for error in errors] == [errno.EIO]
    assert driver.devices() == []


def test_a_stop_that_cancels_waits_no_minute_for_a_stuck_method(driver):
    disk = Stuck()
    device = disk.start()
    with client(driver, device, disk):
        begin = time.monotonic()
        with pytest.raises(ublk.UblkError) as caught:
            device.stop(cancel=True)
        assert time.monotonic() - begin < SOON
        assert caught.value.errno == errno.ETIMEDOUT
        disk.leave.set()
        with contextlib.suppress(ublk.UblkError):
            device.stop()


def test_a_coroutine_that_is_not_to_be_cancelled_loses_its_request(driver):
    class Stubborn(Waits):
        async def read(self, offset, buf):
            self.entered.set()
            while not self.leave:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.01)

    disk = Stubborn()
    disk.leave = False
    device = disk.start()
    with client(driver, device, disk) as errors:
        stop_failing_one(device, cancel=True)
    disk.leave = True
    assert [error.errno for error in errors] == [errno.EIO]
    assert driver.devices() == []


def stop_failing_one(device, cancel):
    """Stop a device while a request is not ended: that fails, and soon."""
    begin = time.monotonic()
    if cancel:
        device.stop(cancel=True)
    else:
        with pytest.raises(ublk.UblkError, match="1 requests unfinished") as caught:
            device.stop(timeout=0.1)
        assert caught.value.errno == errno.EIO
    assert time.monotonic() - begin < SOON
    # Again is harmless.
    device.stop()


def test_a_stop_fails_requests_of_coroutines_that_wait_when_the_time_is_over(driver):
    disk = Waits()
    device = disk.start()
    with client(driver, device, disk) as errors:
        begin = time.monotonic()
        with pytest.raises(ublk.UblkError, match="1 requests unfinished"):
            device.stop(timeout=0.1)
        assert time.monotonic() - begin < SOON
    assert errors
    assert disk.cancelled.wait(10)
    assert driver.devices() == []
    device.stop()


def test_a_stop_that_cancels_ends_coroutines_that_wait(driver):
    disk = Waits()
    device = disk.start()
    with client(driver, device, disk) as errors:
        begin = time.monotonic()
        device.stop(cancel=True)
        assert time.monotonic() - begin < SOON
    assert disk.cancelled.is_set()
    assert errors[0].errno in (errno.ECANCELED, errno.ENODEV)


def test_a_stop_that_cancels_does_so_on_the_caller_s_loop(driver):
    async def main():
        disk = Waits()
        device = await disk.start_async()
        reading = asyncio.ensure_future(asyncio.to_thread(driver.read, device.id, 0, 512))
        while not disk.entered.is_set():
            await asyncio.sleep(0.01)
        await device.stop_async(cancel=True)
        assert disk.cancelled.is_set()
        with pytest.raises(OSError):
            await reading

    begin = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - begin < SOON


def test_a_stop_needs_no_thread_of_the_loop_s_executor(driver):
    """They may all be in calls of handlers that wait."""
    leave = threading.Event()

    async def main():
        loop = asyncio.get_running_loop()
        loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(1))
        calls = [asyncio.ensure_future(asyncio.to_thread(leave.wait)) for _ in range(2)]
        await asyncio.sleep(0)
        try:
            device = await asyncio.wait_for(Waits().start_async(), 60)
            await asyncio.wait_for(device.stop_async(cancel=True), 60)
        finally:
            leave.set()
            await asyncio.gather(*calls)

    # Whatever has gone wrong.
    timer = threading.Timer(100, leave.set)
    timer.start()
    try:
        asyncio.run(main())
    finally:
        timer.cancel()
    assert driver.devices() == []


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_a_time_that_cannot_be_waited_for_is_a_value_error(driver, timeout):
    with Stuck().start() as device, pytest.raises(ValueError, match="timeout"):
        device.stop(timeout=timeout)


@pytest.mark.parametrize("timeout", [None, 1e300, float("inf")])
def test_a_stop_may_wait_for_as_long_as_it_takes(driver, timeout):
    device = Stuck().start()
    device.stop(timeout=timeout)
    assert not device.running


def test_a_coroutine_that_stops_its_own_device_is_told_at_once(caplog):
    class Stops(ublk.BlockDevice):
        async def read(self, offset, buf):
            for stop in (self.file.device.stop, self.file.device.stop_async):
                with pytest.raises(RuntimeError, match=r"own device|this event loop"):
                    await stop()
            buf[:] = bytes(len(buf))

    disk = Stops(size=SIZE)
    begin = time.monotonic()
    with testing.open(disk) as disk.file:
        assert disk.file.pread(0, 512) == bytes(512)
    assert time.monotonic() - begin < SOON


def test_a_task_that_a_coroutine_has_made_may_stop_the_device(driver):
    class Stops(ublk.BlockDevice):
        async def read(self, offset, buf):
            self.task = asyncio.get_running_loop().create_task(self.device.stop_async())
            buf[:] = bytes(len(buf))

    disk = Stops(size=SIZE)
    disk.device = disk.start()
    driver.read(0, 0, 512)
    assert disk.device.wait(10)
    until(lambda: driver.devices() == [])


@pytest.mark.parametrize("options", [{}, {"workers": 2}], ids=["methods", "workers"])
def test_a_handler_may_stop_another_device(options):
    class Inner(ublk.BlockDevice):
        def read(self, offset, buf):
            buf[:] = b"i" * len(buf)

    class Outer(ublk.BlockDevice):
        def read(self, offset, buf):
            with testing.open(Inner(size=SIZE)) as self.inner:
                buf[:] = self.inner.pread(0, len(buf))

    outer = Outer(size=SIZE)
    with testing.open(outer, **options) as file:
        assert file.pread(0, 4) == b"iiii"
    assert not outer.inner.device.running


def test_an_exception_on_the_way_to_a_stop_does_not_keep_it_from_the_device(driver, monkeypatch):
    device = Stuck().start()
    monkeypatch.setattr(device._serving, "abandon", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        device.stop()
    assert driver.devices() == []
