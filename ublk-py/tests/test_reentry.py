# SPDX-License-Identifier: MIT OR Apache-2.0

"""Signal handlers that start and stop devices while the main thread starts and stops another one."""

import subprocess
import sys

import pytest

# The beginning of the programs below.
BEGINNING = """
import faulthandler, importlib, signal, sys
import pytest
import ublk
from ublk import _interval, _lifecycle, _signals, _watchdog
from ublk._driver import using
from ublk._ublk import FakeDriver

faulthandler.dump_traceback_later(300, exit=True)

class Disk(ublk.BlockDevice):
    def read(self, offset, buf):
        buf[:] = bytes(len(buf))

def start():
    with using(FakeDriver()):
        return Disk(size=1 << 20).start(workers=1)
"""

# Runs what a handler would, once, before each line of the modules whose locks are taken.
PROGRAM = """
def stop():
    other.stop()

def start_another():
    another.append(start())

def start_and_stop():
    start().stop()

def replace():
    other.stop()
    another.append(start())

handler = globals()[sys.argv[1]]
modules = [vars(importlib.import_module(f"ublk.{name}")) for name in sys.argv[2:]]

def trace(frame, event, argument):
    global line
    if not any(frame.f_globals is module for module in modules):
        return None
    if event == "line":
        line += 1
        if line == interrupted:
            handler()
    return trace

def check_adjusted(what):
    assert sys.getswitchinterval() == pytest.approx(0.0005), (what, interrupted)
    for number in (signal.SIGTERM, signal.SIGHUP):
        assert signal.getsignal(number) is _signals._terminate, (what, interrupted, number)

default, interrupted, line = sys.getswitchinterval(), 0, 0
while line >= interrupted:
    interrupted, line = interrupted + 1, 0
    other, another = start(), []
    sys.settrace(trace)
    device = start()
    sys.settrace(None)
    check_adjusted("the device runs")
    if line < interrupted:
        other.stop()
        sys.settrace(trace)
    device.stop()
    sys.settrace(None)
    if another:
        check_adjusted("another device runs")
    for one in [other, *another]:
        one.stop()
    assert sys.getswitchinterval() == pytest.approx(default), interrupted
    for number in (signal.SIGTERM, signal.SIGHUP):
        assert signal.getsignal(number) == signal.SIG_DFL, (interrupted, number)
    assert not _lifecycle.running and not _lifecycle._starting
    assert not _interval._devices and not _signals._devices and not _watchdog._watched
print(interrupted)
"""


@pytest.mark.parametrize("modules", [["_interval", "_lifecycle", "_threads"], ["_signals", "_watchdog"]], ids="-".join)
@pytest.mark.parametrize("handler", ["stop", "start_another", "start_and_stop", "replace"])
def test_a_signal_handler_may_start_and_stop_devices(handler, modules):
    command = [sys.executable, "-c", BEGINNING + PROGRAM, handler, *modules]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=330)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 30


# Interrupts the start and the end of a device once before each line of the module that handles signals.
INTERRUPTED = """
def trace(frame, event, argument):
    global line
    if frame.f_globals is not vars(_signals) or frame.f_code.co_name == "_terminate":
        return None
    if event == "line":
        line += 1
        if line == interrupted:
            sys.settrace(None)
            raise KeyboardInterrupt
    return trace

interrupted, line = 0, 0
while line >= interrupted:
    interrupted, line = interrupted + 1, 0
    # What earlier devices have left.
    _signals._devices.clear()
    _signals._replaced.clear()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    sys.settrace(trace)
    try:
        start().stop()
    except KeyboardInterrupt:
        pass
    sys.settrace(None)
    next_one = start()
    for number in (signal.SIGTERM, signal.SIGHUP):
        assert signal.getsignal(number) is _signals._terminate, (interrupted, number)
    next_one.stop()
print(interrupted)
"""


def test_signals_are_handled_after_a_start_or_stop_that_was_interrupted():
    ended = subprocess.run([sys.executable, "-c", BEGINNING + INTERRUPTED], capture_output=True, text=True, timeout=330)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 20
