# SPDX-License-Identifier: MIT OR Apache-2.0

"""Starts, stops and hand-overs that something interrupts."""

import contextlib
import logging
import os
import signal
import threading

import pytest
from support import recover_when_free

import ublk
from ublk import _signals

SIZE = 1 << 20


class Interrupted(BaseException):
    """What a signal's handler raises."""


class Slow(ublk.BlockDevice):
    """Reads that take until they may end."""

    def __init__(self):
        super().__init__(size=SIZE)
        self.entered, self.leave = threading.Event(), threading.Event()

    def read(self, offset, buf):
        self.entered.set()
        self.leave.wait(60)
        buf[:] = b"x" * len(buf)


class Client:
    """Reads from a device, until the read has ended."""

    def __init__(self, driver, id):
        self.driver, self.id, self.error = driver, id, None
        self.thread = threading.Thread(target=self.read)
        self.thread.start()

    def read(self):
        try:
            self.driver.read(self.id, 0, 512)
        except OSError as error:
            self.error = error


@contextlib.contextmanager
def interrupting(begun):
    """Have a signal's handler raise in this thread, time and again until it has, once an event is set."""

    def interrupt(*_):
        if begun.is_set():
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("depth", [1, 2], ids=["all-tags", "free-tags"])
@pytest.mark.parametrize("again", [False, True], ids=["once", "stopped-after-that"])
def test_a_hand_over_that_is_interrupted_leaves_the_disk(driver, monkeypatch, caplog, depth, again):
    disk = Slow()
    device = disk.start(recoverable=True, workers=2, depth=depth)
    begun = threading.Event()
    monkeypatch.setattr(device._serving, "abandon", begun.set)
    client = Client(driver, device.id)
    assert disk.entered.wait(10)
    with pytest.raises(Interrupted), interrupting(begun):
        device.quiesce()
    if again:
        # As the end of a `with` block does.
        with contextlib.suppress(ublk.UblkError):
            device.stop(timeout=0)
    for thread in threading.enumerate():
        if thread.name == "ublk-stop":
            thread.join(60)
    assert driver.devices() == [device.id]
    assert client.error is None
    disk.leave.set()
    new = Slow()
    new.leave.set()
    recover_when_free(device.id, new).stop()
    client.thread.join(10)
    assert client.error is None


def test_a_stop_that_was_interrupted_names_no_time_it_has_not_waited(driver):
    disk = Slow()
    device = disk.start(workers=1)
    client = Client(driver, device.id)
    assert disk.entered.wait(10)
    # As the handler of a signal does.
    device._native.expedite()
    with pytest.raises(ublk.UblkError, match="1 requests unfinished when the wait for them was interrupted"):
        device.stop()
    disk.leave.set()
    client.thread.join(10)


@pytest.fixture
def again(monkeypatch):
    """Sets after how many seconds a signal is a second one."""
    return lambda seconds: monkeypatch.setattr(_signals, "AGAIN_SECONDS", seconds)


@pytest.fixture
def running(driver):
    """SIGTERM and SIGHUP raise, as a device is running."""
    with Slow().start():
        yield


def test_signals_that_come_with_the_first_one_do_not_raise_again(running, again):
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGTERM)
    again(1e9)
    signal.raise_signal(signal.SIGTERM)
    again(0)
    signal.raise_signal(signal.SIGHUP)
    with pytest.raises(SystemExit) as raised:
        signal.raise_signal(signal.SIGTERM)
    assert raised.value.code == 128 + signal.SIGTERM


def test_each_device_is_ended_by_a_first_signal(driver):
    for _ in range(2):
        with pytest.raises(SystemExit), Slow().start():
            signal.raise_signal(signal.SIGHUP)


def test_only_a_second_signal_interrupts_what_signals_wait_for(running, again):
    reached = []
    with pytest.raises(SystemExit), _signals.deferred():
        signal.raise_signal(signal.SIGTERM)
        again(1e9)
        signal.raise_signal(signal.SIGTERM)
        again(0)
        signal.raise_signal(signal.SIGHUP)
        reached.append(1)
    with pytest.raises(SystemExit), _signals.deferred():
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        reached.append(2)
    assert reached == [1]


@pytest.mark.parametrize("interrupted", [False, True])
def test_only_a_second_signal_ends_a_process_that_is_ending(running, again, monkeypatch, interrupted):
    done = []
    monkeypatch.setattr(os, "_exit", lambda status: done.append(status))
    with _signals.hurrying(lambda: done.append("hurry"), again=interrupted):
        if not interrupted:
            signal.raise_signal(signal.SIGTERM)
            assert done == ["hurry"]
        again(1e9)
        signal.raise_signal(signal.SIGTERM)
        again(0)
        signal.raise_signal(signal.SIGHUP)
        assert set(done) == {"hurry"}
        signal.raise_signal(signal.SIGTERM)
        assert 128 + signal.SIGTERM in done


def test_what_comes_with_the_signal_that_ends_a_program_does_not_hurry_it(running, again):
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGTERM)
    done = []
    with _signals.hurrying(lambda: done.append("hurry")):
        again(1e9)
        signal.raise_signal(signal.SIGTERM)
        again(0)
        signal.raise_signal(signal.SIGHUP)
        assert done == []
        signal.raise_signal(signal.SIGTERM)
        assert done == ["hurry"]


@pytest.fixture
def interrupted_log(caplog):
    """Has SIGTERM come in the main thread while a given message is logged."""

    def interrupt(record):
        if begins and record.getMessage().startswith(begins[0]) and threading.current_thread() is main:
            begins.clear()
            signal.raise_signal(signal.SIGTERM)
        return True

    begins, main, logger = [], threading.current_thread(), logging.getLogger("ublk")
    logger.addFilter(interrupt)
    with caplog.at_level(logging.DEBUG, "ublk"):
        yield begins.append
    logger.removeFilter(interrupt)


@pytest.mark.filterwarnings("error")
def test_a_signal_while_the_engine_logs_is_raised(driver, interrupted_log):
    interrupted_log("")
    with pytest.raises(SystemExit), Slow().start() as device:
        device.wait(10)


@pytest.mark.filterwarnings("error")
def test_a_signal_while_a_dropped_request_is_logged_is_raised(driver, interrupted_log):
    with ublk.BlockDevice(size=SIZE).start(pull=True) as device:
        assert device.wait_ready(10)
        client = Client(driver, device.id)
        request = next(iter(device.requests()))
        interrupted_log("request read")
        with pytest.raises(SystemExit):
            del request
            # Soon, not at once.
            for _ in range(1000):
                os.getpid()
        client.thread.join(10)
        assert client.error is not None


def test_a_quiesce_that_is_interrupted_before_it_begins_changes_nothing(driver, monkeypatch):
    device = Slow().start(recoverable=True)

    def interrupt(*_, **__):
        raise Interrupted

    monkeypatch.setattr(device, "_end", interrupt)
    with pytest.raises(Interrupted):
        device.quiesce()
    monkeypatch.undo()
    assert device.running
    device.stop()
    assert driver.devices() == []


@pytest.mark.parametrize("place", range(6), ids=lambda place: f"call-{place}")
def test_a_signal_while_signals_are_deferred_or_put_back_leaves_no_handler(monkeypatch, place):
    replace, calls = signal.signal, []

    def interrupt(number, handler):
        before = replace(number, handler)
        calls.append(number)
        if len(calls) == place + 1:
            raise Interrupted
        return before

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    monkeypatch.setattr(signal, "signal", interrupt)
    with pytest.raises(Interrupted), _signals.deferred():
        pass
    monkeypatch.undo()
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert after == before
