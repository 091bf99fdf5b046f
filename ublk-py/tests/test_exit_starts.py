# SPDX-License-Identifier: MIT OR Apache-2.0

"""The end of a program while it starts devices."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import atexit, threading, time

# Runs after the handlers of ublk.
atexit.register(lambda: print("devices at the end:", driver.devices(), flush=True))

import ublk
from ublk._driver import using
from ublk._ublk import FakeDriver

class Disk(ublk.BlockDevice):
    def read(self, offset, buf):
        buf[:] = bytes(len(buf))

def start_and_stop():
    devices = []
    while True:
        with using(driver):
            devices.append(Disk(size=1 << 20).start())
        begun.set()
        if len(devices) > 3:
            devices.pop(0).stop()

driver, begun = FakeDriver(), threading.Event()
threading.Thread(target=start_and_stop, daemon=True).start()
begun.wait()
time.sleep({seconds})
"""


def test_no_device_is_left_that_a_thread_starts_meanwhile():
    for turn in range(6):
        argv = [sys.executable, "-c", PROGRAM.format(seconds=turn / 20)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=180)
        assert "devices at the end: []" in done.stdout, done.stderr
        assert done.returncode == 0, done.stderr


SIGNALLED = """
import asyncio, atexit, os, signal, threading

# Runs after the handlers of ublk.
atexit.register(lambda: print("devices at the end:", driver.devices(), flush=True))

import ublk
from ublk import _start
from ublk._driver import using
from ublk._ublk import FakeDriver

class Disk(ublk.BlockDevice):
    {word} read(self, offset, buf):
        buf[:] = bytes(len(buf))

driver, begin = FakeDriver(), _start._begin

def begin_and_be_killed(self):
    # The device is there, and not live.
    begin(self)
    os.kill(os.getpid(), signal.SIGTERM)

_start._begin = begin_and_be_killed
with using(driver):
    {start}
"""
STARTS = {
    "plain": ("def", "Disk(size=1 << 20).start()"),
    "pull": ("def", "ublk.BlockDevice(size=1 << 20).start(pull=True)"),
    "async": ("async def", "asyncio.run(Disk(size=1 << 20).start_async())"),
}


@pytest.mark.parametrize("kind", STARTS)
def test_sigterm_during_a_start_leaves_no_device(kind):
    word, start = STARTS[kind]
    argv = [sys.executable, "-c", SIGNALLED.format(word=word, start=start)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "devices at the end: []" in done.stdout, done.stderr


INTERRUPTED = """
import atexit, os, signal, threading

# Runs after the handlers of ublk.
atexit.register(lambda: print("devices at the end:", driver.devices(), flush=True))

import ublk
from ublk import _start
from ublk._driver import using
from ublk._ublk import FakeDriver

class Slow(ublk.BlockDevice):
    def read(self, offset, buf):
        entered.set()
        leave.wait()

driver, entered, leave = FakeDriver(), threading.Event(), threading.Event()
# Before the handlers of ublk.
atexit.register(leave.set)

def read(id):
    try:
        driver.read(id, 0, 512)
    except OSError:
        pass

def register(self):
    # Ctrl-C comes while the kernel reads the disk.
    threading.Thread(target=read, args=[self.id], daemon=True).start()
    entered.wait()
    raise KeyboardInterrupt

def undo_and_be_interrupted(self, made):
    print("undoing", flush=True)
    undo(self, made)

undo = _start._undo
_start._register, _start._undo = register, undo_and_be_interrupted
with using(driver):
    Slow(size=1 << 20).start()
"""


def test_ctrl_c_during_the_undo_of_a_start_leaves_no_device():
    program = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert program.stdout.readline() == "undoing\n"
        program.send_signal(signal.SIGINT)
        out, err = program.communicate(timeout=120)
    finally:
        program.kill()
        program.wait()
    assert "devices at the end: []" in out, err
