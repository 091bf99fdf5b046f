# SPDX-License-Identifier: MIT OR Apache-2.0

"""Isolated devices that are left to another server, and what may happen meanwhile."""

import atexit
import errno
import os
import signal
import threading

import pytest
from support import SOON, start_isolated, until

import ublk
from ublk import _device, _isolated, _ublk


class Disk(ublk.BlockDevice):
    """Its process writes whether the device was there at its end."""

    def __init__(self, directory, *, slow=False):
        super().__init__(size=1 << 20)
        self.fate, self.slow = directory / "fate", slow

    def __setstate__(self, state):
        self.__dict__ = state
        make = _ublk.FakeDriver

        def driver_with_witness():
            driver = make()
            atexit.register(
                lambda: self.fate.write_text(f"{'left' if driver.devices() else 'deleted'}, {self.size} bytes")
            )
            return driver

        _ublk.FakeDriver = driver_with_witness
        if self.slow:
            _device.Device.quiesce = quiesce_after_a_stop

    def read(self, offset, buf):
        buf[:] = bytes(len(buf))


quiesce = _device.Device.quiesce


def quiesce_after_a_stop(device):
    """Stand for a thread that begins later than that of a stop."""
    until(lambda: device._native.stopped)
    quiesce(device)


@pytest.fixture
def begin(tmp_path):
    """Start a recoverable device, whose process is killed after the test."""
    devices = []

    def start(**options):
        device = start_isolated(Disk(tmp_path, **options), recoverable=True)
        devices.append(device)
        return device

    yield start
    for device in devices:
        device._native.kill()


def fate(device):
    """Return what became of the device, after all that goes on in the background."""
    for thread in threading.enumerate():
        if thread.name == "ublk-stop":
            thread.join(SOON)
    process = device._native._process
    process.join(SOON)
    assert process.exitcode == 0
    return device._target.fate.read_text().partition(",")[0]


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("again", [False, True], ids=["once", "stopped-after-that"])
def test_an_interrupted_quiesce_leaves_the_disk(begin, monkeypatch, place, again):
    device = begin()
    questions = device._native._questions
    put = questions._put

    def interrupted(question):
        monkeypatch.setattr(questions, "_put", put)
        if place == "after":
            put(question)
        # As the handler of a signal does.
        raise KeyboardInterrupt

    monkeypatch.setattr(questions, "_put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        device.quiesce()
    if again:
        # As the end of a `with` block does.
        device.stop()
    assert fate(device) == "left"
    assert not device.running


def test_a_quiesce_interrupted_before_its_first_step_leaves_the_disk(begin, monkeypatch):
    device = begin()

    def interrupted():
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(device._native, "leave", interrupted)
    with pytest.raises(KeyboardInterrupt):
        device.quiesce()
    assert fate(device) == "left"


def test_a_stop_that_overtakes_a_quiesce_leaves_the_disk(begin):
    device = begin(slow=True)
    questions = device._native._questions
    leaving = threading.Thread(target=questions.ask, args=["leave"], kwargs={"seconds": SOON}, daemon=True)
    put, is_put = questions._put, threading.Event()

    def note(question):
        put(question)
        is_put.set()

    questions._put = note
    leaving.start()
    assert is_put.wait(SOON)
    questions.ask("stop", 30.0, False, seconds=SOON)
    leaving.join(SOON)
    device.stop()
    assert fate(device) == "left"


def test_a_refused_quiesce_has_a_later_stop_delete_the_disk(begin, monkeypatch):
    device = begin()
    refused = _answer_with(device, ublk.UblkError(22, "refused"))
    with monkeypatch.context() as patch:
        patch.setattr(device._native._questions, "ask", refused)
        with pytest.raises(ublk.UblkError, match="refused"):
            device.quiesce()
    assert device.running
    device.stop()
    assert fate(device) == "deleted"


def _answer_with(device, error):
    from ublk._isolated_server import Answer, Failure

    return lambda *question, **limits: Answer(1, error=Failure.of(error))


def suspend(device):
    os.kill(device._native._process.pid, signal.SIGSTOP)


def resume(device):
    """Let a process go on, and wait until it has read everything that it was asked."""
    os.kill(device._native._process.pid, signal.SIGCONT)
    assert device._native._questions.ask("entries", seconds=SOON).value == 0


def times_out(act, *arguments, **options):
    with pytest.raises(ublk.UblkError, match="does not answer after") as caught:
        act(*arguments, **options)
    assert caught.value.errno == errno.ETIMEDOUT


@pytest.fixture
def impatience(monkeypatch):
    """Have the program wait for answers for a second, and leave a suspended process alone."""
    monkeypatch.setattr(_isolated.RemoteDevice, "_resume", lambda self: None)
    for limit in ("_BEGIN_SECONDS", "_LEAVE_SECONDS", "_STOP_SECONDS"):
        monkeypatch.setattr(_isolated, limit, 0.5)
    monkeypatch.setattr(_isolated, "_ANSWER_SECONDS", 1.0)
    yield
    monkeypatch.undo()


def test_a_suspended_process_goes_on_to_leave_its_device(begin):
    device = begin()
    suspend(device)
    device.quiesce()
    assert fate(device) == "left"


def test_a_quiesce_that_timed_out_is_not_carried_out_later(begin, impatience, monkeypatch):
    device = begin()
    suspend(device)
    times_out(device.quiesce)
    resume(device)
    assert device.wait(2) is False
    monkeypatch.undo()
    # As for any device whose quiesce has failed without being refused.
    device.stop()
    assert fate(device) == "left"


def test_a_stop_that_timed_out_is_not_carried_out_later(begin, impatience, monkeypatch):
    device = begin()
    suspend(device)
    times_out(device.stop, timeout=0.1)
    resume(device)
    assert device.wait(2) is False
    monkeypatch.undo()
    device.quiesce()
    assert fate(device) == "left"


def test_a_resize_that_timed_out_is_not_carried_out_later(begin, impatience, monkeypatch):
    device = begin()
    suspend(device)
    times_out(device.resize, 1 << 21)
    resume(device)
    monkeypatch.undo()
    device.stop()
    assert fate(device) == "deleted"
    assert device._target.fate.read_text() == f"deleted, {1 << 20} bytes"


def test_what_a_process_is_too_late_for_is_refused(begin, monkeypatch):
    monkeypatch.setattr(_isolated, "_BEGIN_SECONDS", -1.0)
    device = begin()
    for act in (device.quiesce, device.stats):
        with pytest.raises(ublk.UblkError, match="was too late to") as caught:
            act()
        assert caught.value.errno == errno.ETIMEDOUT
    assert device.running
    # That is known, so it is the device's end after all.
    device.stop()
    assert fate(device) == "deleted"
