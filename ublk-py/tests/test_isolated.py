# SPDX-License-Identifier: MIT OR Apache-2.0

"""Devices that a process of their own serves. Here that process has a stand-in driver of its own."""

import atexit
import contextlib
import errno
import logging
import multiprocessing
import os
import signal
import subprocess
import threading
import time

import pytest
from support import start_isolated

import ublk
from ublk import _isolated, testing
from ublk._driver import using
from ublk._ublk import FakeDriver

SIZE = 1 << 20


class Disk(ublk.BlockDevice):
    """Reports its arrival in another process, in the given way."""

    def __init__(self, arrival="", **options):
        super().__init__(size=SIZE, **options)
        self.arrival = arrival
        self.lock = None

    def __setstate__(self, state):
        self.__dict__ = state
        if self.arrival == "logs":
            try:
                raise ValueError("a cause")
            except ValueError:
                logging.getLogger("mydisk").warning("arrived in %d", os.getpid(), exc_info=True, extra={"x": object()})
        elif self.arrival == "raises":
            raise RuntimeError("the copy does not work")
        elif self.arrival == "raises its own":
            raise Odd(1, 2)
        elif self.arrival == "forks":
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
        elif self.arrival == "sleeps":
            time.sleep(2)
        elif self.arrival == "dies":
            os.kill(os.getpid(), signal.SIGKILL)

    def read(self, offset, buf):
        buf[:] = bytes(len(buf))


class Odd(Exception):
    """Cannot be copied."""

    def __init__(self, one, two):
        super().__init__("odd")


class Mapped(Disk):
    """Has extents, which stay where they are."""

    def map(self, op, offset, length):
        return ublk.Zeros(length)


@pytest.mark.parametrize(("kind", "workers"), [(Disk, None), (Disk, 2), (Mapped, None)])
def test_the_device_does_what_others_do(kind, workers):
    with start_isolated(kind(), queues=2, depth=7, id=5, workers=workers, recoverable="queue") as dev:
        assert (dev.id, dev.queues, dev.depth, dev.size, dev.recovery) == (5, 2, 7, SIZE, "queue")
        assert dev.running
        assert dev.wait(0) is False
        assert dev.stats().requests == 0
        dev.resize(2 * SIZE)
        assert dev.size == 2 * SIZE
        with pytest.raises(ValueError, match="size = 1000"):
            dev.resize(1000)
    assert not dev.running
    assert dev.wait(10) is True
    assert dev.stats().entries == 0
    dev.stop()


def test_its_process_ends_with_it():
    with start_isolated(Disk()) as dev:
        process = dev._native._process
        assert process.is_alive()
    assert process.exitcode == 0


@pytest.mark.parametrize("timeout", [None, 1e7])
def test_a_stop_may_take_as_long_as_it_likes(timeout):
    dev = start_isolated(Disk())
    dev.stop(timeout=timeout)
    assert not dev.running


def test_several_threads_may_ask_and_stop():
    dev = start_isolated(Disk())
    threads = [threading.Thread(target=dev.stats) for _ in range(4)]
    threads += [threading.Thread(target=dev.stop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not dev.running


def test_its_log_comes_here(caplog):
    with start_isolated(Disk("logs")) as dev:
        pid = dev._native._process.pid
    (record,) = [record for record in caplog.records if record.name == "mydisk"]
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"arrived in {pid}\nTraceback")
    assert record.process == pid


def test_what_cannot_be_copied_is_said():
    disk = Disk()
    disk.lock = threading.Lock()
    with pytest.raises(TypeError, match="cannot pickle") as caught:
        start_isolated(disk)
    assert "copy of the Disk" in caught.value.__notes__[0]


def test_a_copy_that_does_not_work_says_why_with_its_traceback():
    with pytest.raises(RuntimeError, match="the copy does not work") as caught:
        start_isolated(Disk("raises"))
    assert "__setstate__" in caught.value.__notes__[0]


def test_an_exception_that_cannot_be_copied_is_told_by_name():
    with pytest.raises(ublk.UblkError, match="Odd: odd"):
        start_isolated(Disk("raises its own"))


def test_values_that_cannot_be_are_found_before_there_is_a_process():
    with pytest.raises(ValueError, match="size = 1000"):
        start_isolated(Disk(block_size=1000))
    with pytest.raises(ValueError, match="workers = 0"):
        start_isolated(Disk(), workers=0)
    with pytest.raises(ValueError, match="not supported without a kernel"):
        testing.open(Disk(), isolated=True)
    with pytest.raises(ValueError, match="pull=True"):
        start_isolated(ublk.BlockDevice(size=SIZE), pull=True)
    with pytest.raises(ValueError, match="native disk"), using(FakeDriver()):
        ublk.recover(3, ublk.Null(SIZE), isolated=True)


def test_a_process_that_dies_at_once_is_told_with_its_signal():
    with pytest.raises(ublk.UblkError, match=r"was killed by SIGKILL before the disk was there.*__main__") as caught:
        start_isolated(Disk("dies"))
    assert caught.value.errno == errno.EOWNERDEAD


def ends_as_told(dev, seconds=20):
    with pytest.raises(ublk.UblkError, match="was killed by SIGKILL") as caught:
        assert dev.wait(seconds)
    assert caught.value.errno == errno.EOWNERDEAD
    assert not dev.running


@pytest.mark.parametrize("arrival", ["", "forks"])
def test_a_process_that_is_killed_is_told_whoever_has_its_pipes(arrival):
    with start_isolated(Disk(arrival)) as dev:
        os.kill(dev._native._process.pid, signal.SIGKILL)
        ends_as_told(dev)
        with contextlib.suppress(ublk.UblkError):
            dev.stats()
    subprocess.run(["pkill", "-KILL", "-g", str(dev._native._process.pid)], check=False)


def test_a_program_whose_logging_fails_is_told_of_the_end(capsys):
    def refuse(record):
        raise ZeroDivisionError("in a filter")

    logger = logging.getLogger("mydisk")
    logger.addFilter(refuse)
    try:
        with start_isolated(Disk("logs")) as dev:
            said, deadline = "", time.monotonic() + 20
            while "ZeroDivisionError: in a filter" not in said:
                assert time.monotonic() < deadline
                time.sleep(0.01)
                said += capsys.readouterr().err
            os.kill(dev._native._process.pid, signal.SIGKILL)
            ends_as_told(dev)
    finally:
        logger.removeFilter(refuse)


def test_ctrl_c_while_the_process_starts_leaves_nothing():
    made = []
    remember = _isolated._remotes.add
    _isolated._remotes.add, before = lambda remote: (made.append(remote), remember(remote)), time.monotonic()
    try:
        threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            start_isolated(Disk("sleeps"))
    finally:
        _isolated._remotes.add = remember
    assert time.monotonic() - before < 30
    assert [remote._process.exitcode for remote in made] == [0]


def test_a_stop_that_is_interrupted_may_be_repeated():
    dev = start_isolated(Disk())
    join, calls = dev._native._process.join, []

    def interrupted(seconds=None):
        calls.append(seconds)
        if len(calls) == 1:
            raise KeyboardInterrupt
        join(seconds)

    dev._native._process.join = interrupted
    with pytest.raises(KeyboardInterrupt):
        dev.stop()
    dev.stop()
    assert dev._native._process.exitcode == 0
    assert not dev.running


def test_a_forked_child_leaves_the_process_to_its_parent(capfd):
    with start_isolated(Disk()) as dev:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                dev.stop()
                with contextlib.suppress(ublk.UblkError):
                    dev.stats()
                    os._exit(2)
                status = 0
            finally:
                # As `sys.exit` does.
                atexit._run_exitfuncs()
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert dev.stats().requests == 0
        assert dev.running
    assert "Error" not in capfd.readouterr().err


def serve_and_return():
    start_isolated(Disk())


def test_a_worker_of_multiprocessing_ends_without_a_stop():
    worker = multiprocessing.get_context("fork").Process(target=serve_and_return)
    worker.start()
    worker.join(30)
    assert worker.exitcode == 0


def process_of(device):
    return device._native._process


def test_a_suspended_process_goes_on_to_stop_its_device():
    device = start_isolated(Disk())
    process = process_of(device)
    os.kill(process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    device.stop(timeout=20)
    assert time.monotonic() - begin < 20
    assert process.exitcode == 0
    assert not device.running


def test_a_process_that_does_not_answer_a_stop_is_killed(monkeypatch):
    monkeypatch.setattr(_isolated, "_STOP_SECONDS", 0.5)
    monkeypatch.setattr(_isolated.RemoteDevice, "_resume", lambda self: None)
    device = start_isolated(Disk())
    process = process_of(device)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(ublk.UblkError, match="was killed, and its requests failed") as caught:
        device.stop(timeout=0.1)
    assert caught.value.errno == errno.EIO
    assert process.exitcode == -signal.SIGKILL
    assert not device.running
    device.stop()


def test_a_stop_that_cancels_does_so_in_the_other_process(monkeypatch):
    asked = []
    ask = _isolated.Questions.ask

    def note(self, question, *arguments, **more):
        asked.append((question, arguments))
        return ask(self, question, *arguments, **more)

    monkeypatch.setattr(_isolated.Questions, "ask", note)
    device = start_isolated(Disk())
    device.stop(cancel=True)
    assert asked == [("stop", (1.0, True))]


def test_a_stop_that_is_expedited_waits_for_no_process(monkeypatch):
    monkeypatch.setattr(_isolated.RemoteDevice, "_resume", lambda self: None)
    device = start_isolated(Disk())
    process = process_of(device)
    os.kill(process.pid, signal.SIGSTOP)
    threading.Timer(0.5, device._native.expedite).start()
    begin = time.monotonic()
    with pytest.raises(ublk.UblkError, match="was killed"):
        device.stop(timeout=None)
    assert time.monotonic() - begin < 20
    assert process.exitcode == -signal.SIGKILL
