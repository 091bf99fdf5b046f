# SPDX-License-Identifier: MIT OR Apache-2.0

"""Stops of isolated devices whose handlers are stuck."""

import contextlib
import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from support import SOON, start_isolated, until

import ublk
from ublk import _device, _lifecycle, _ublk

SIZE = 1 << 20
# Longer than `SOON`.
LONG = 600


class Stuck(ublk.BlockDevice):
    """In the other process a client reads from it, and its method does not return."""

    def __init__(self, directory, orphan_seconds=None):
        super().__init__(size=SIZE)
        self.directory, self.orphan_seconds = directory, orphan_seconds

    def __setstate__(self, state):
        self.__dict__ = state
        make = _ublk.FakeDriver

        def driver_with_client():
            driver = make()
            threading.Thread(target=self.client, args=[driver], daemon=True).start()
            return driver

        _ublk.FakeDriver = driver_with_client
        if self.orphan_seconds is not None:
            # For what a process does without its program, which would take long.
            _device.Device.stop.__defaults__ = (self.orphan_seconds,)

    def client(self, driver):
        while not driver.devices():
            time.sleep(0.01)
        # Until the device is live.
        while not os.path.exists(os.path.join(self.directory, "entered")):
            with contextlib.suppress(OSError):
                driver.read(driver.devices()[0], 0, 512)
            time.sleep(0.01)

    def read(self, offset, buf):
        open(os.path.join(self.directory, "entered"), "w").close()
        threading.Event().wait()


def wait_for_stop(device):
    """Wait until another thread is about to stop a device, and most probably asks for it."""
    until(lambda: device._stopped)
    time.sleep(0.5)


@pytest.fixture
def begin(tmp_path):
    """Start a device whose handler is stuck; nothing is left of it after the test."""
    devices = []

    def start(**options):
        device = start_isolated(Stuck(str(tmp_path)), **options)
        devices.append(device)
        until((tmp_path / "entered").exists)
        return device

    yield start
    for device in devices:
        with contextlib.suppress(ProcessLookupError):
            os.kill(device._native._process.pid, signal.SIGKILL)
        with contextlib.suppress(ublk.UblkError):
            device.stop(timeout=0)


class Stop:
    """A stop in a thread of its own."""

    def __init__(self, device, **options):
        self.error = None
        self.thread = threading.Thread(target=self.run, args=[device], kwargs=options, daemon=True)
        self.thread.start()

    def run(self, device, **options):
        try:
            device.stop(**options)
        except Exception as error:
            self.error = error

    def join(self, seconds=SOON):
        self.thread.join(seconds)
        assert not self.thread.is_alive()
        return self.error


def test_the_stop_with_the_least_time_decides(begin):
    device = begin(workers=2)
    patient = Stop(device, timeout=LONG)
    wait_for_stop(device)
    hasty = Stop(device, timeout=0.1)
    assert hasty.join().errno == errno.EIO
    assert patient.join().errno == errno.EIO
    assert not device.running


def test_a_stop_that_cancels_hurries_one_under_way(begin):
    device = begin(workers=2)
    patient = Stop(device, timeout=LONG)
    wait_for_stop(device)
    assert Stop(device, cancel=True).join() is None
    patient.join()


def test_a_stop_that_is_expedited_fails_requests(begin):
    device = begin(workers=2)
    patient = Stop(device, timeout=LONG)
    wait_for_stop(device)
    device._native.expedite()
    assert patient.join().errno == errno.EIO


def test_a_stuck_process_is_killed_by_the_hastiest_stop(begin):
    device = begin()
    patient = Stop(device, timeout=LONG)
    wait_for_stop(device)
    for stop in (Stop(device, timeout=0.1), patient):
        error = stop.join()
        assert error.errno == errno.EIO
        assert "was killed, and its requests failed" in str(error)


def test_questions_are_answered_while_a_stop_waits(begin):
    device = begin(workers=2)
    patient = Stop(device, timeout=LONG)
    wait_for_stop(device)
    asking = threading.Thread(target=device.stats, daemon=True)
    asking.start()
    asking.join(SOON)
    assert not asking.is_alive()
    assert patient.thread.is_alive()
    Stop(device, timeout=0).join()


PROGRAM = """
import os, signal, sys, threading, time
import test_isolated_stop as tests

if __name__ == "__main__":
    disk = tests.Stuck(sys.argv[1], orphan_seconds=0.1)
    workers, recoverable = map(eval, sys.argv[2:])
    device = tests.start_isolated(disk, workers=workers, recoverable=recoverable)
    print(device._native._process.pid, flush=True)
    tests.until(lambda: os.path.exists(os.path.join(sys.argv[1], "entered")))
"""


@contextlib.contextmanager
def program(tmp_path, code, workers=2, recoverable=False):
    """A program with a device whose handler is stuck, and the process that serves it."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM + code)
    here = os.path.dirname(os.path.abspath(__file__))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    command = [sys.executable, str(path), str(tmp_path), str(workers), str(recoverable)]
    pid = None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            pid = int(process.stdout.readline())
            yield process, os.pidfd_open(pid)
        finally:
            process.kill()
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def is_over(pidfd):
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return True
    # Perhaps nothing waits for it.
    with open(f"/proc/self/fdinfo/{pidfd}") as file:
        pid = next(line.split()[1] for line in file if line.startswith("Pid:"))
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] == "Z"


def test_a_signal_handler_may_stop_what_is_being_stopped(tmp_path):
    code = """
    def hurry(number, frame):
        try:
            device.stop(timeout=0.1)
        except OSError as error:
            print("inner", error.errno, flush=True)

    def alarm():
        tests.wait_for_stop(device)
        os.kill(os.getpid(), signal.SIGALRM)

    signal.signal(signal.SIGALRM, hurry)
    threading.Thread(target=alarm, daemon=True).start()
    try:
        device.stop(timeout=None)
    except OSError as error:
        print("outer", error.errno, flush=True)
    """
    with program(tmp_path, code) as (process, _child):
        out, _err = process.communicate(timeout=SOON)
    assert out.split() == ["inner", "5", "outer", "5"]


@pytest.mark.parametrize("recoverable", [False, True])
@pytest.mark.parametrize("workers", [2, None], ids=["workers", "methods"])
def test_a_process_whose_program_dies_while_it_stops_ends(tmp_path, workers, recoverable):
    code = """
    threading.Thread(target=device.stop, args=[None], daemon=True).start()
    tests.wait_for_stop(device)
    print("stopping", flush=True)
    time.sleep(600)
    """
    with program(tmp_path, code, workers, recoverable) as (process, child):
        assert process.stdout.readline() == "stopping\n"
        process.kill()
        process.wait()
        until(lambda: is_over(child))


@pytest.mark.parametrize("recoverable", [False, True])
def test_a_stop_that_takes_requests_back_says_so(begin, recoverable):
    device = begin(workers=2, recoverable=recoverable)
    error = Stop(device, timeout=0.1).join()
    assert error.errno == errno.EIO
    assert error.strerror == f"{device.path}: 1 requests unfinished after 0.1 s; they failed, the device is deleted"
    assert not device.running
    assert device not in _lifecycle.running
    assert device._native._process.exitcode is not None
    device.stop()


def test_a_stop_that_cancels_logs_requests_that_it_fails(begin, caplog):
    device = begin(workers=2)
    assert Stop(device, cancel=True).join() is None
    (record,) = [record for record in caplog.records if "requests unfinished" in record.getMessage()]
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{device.path}: 1 requests unfinished after 1 s;")


def test_a_stop_that_cancels_raises_nothing_for_a_kill(begin, caplog):
    device = begin()
    assert Stop(device, cancel=True).join() is None
    assert any("was killed, and its requests failed" in record.getMessage() for record in caplog.records)
    assert not device.running
