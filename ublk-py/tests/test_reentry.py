# SPDX-License-Identifier: MIT OR Apache-2.0

"""Signal handlers that start and stop devices while the main thread starts and stops another one."""

import subprocess
import sys

import pytest

# Runs what a handler would, once, before each line of the modules whose locks are taken.
PROGRAM = """
import faulthandler, sys
import pytest
import ublk
from ublk import _interval, _lifecycle, _threads
from ublk._driver import using
from ublk._ublk import FakeDriver

faulthandler.dump_traceback_later(300, exit=True)

class Disk(ublk.BlockDevice):
    def read(self, offset, buf):
        buf[:] = bytes(len(buf))

def start():
    with using(FakeDriver()):
        return Disk(size=1 << 20).start(workers=1)

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
modules = [vars(_interval), vars(_lifecycle), vars(_threads)]

def trace(frame, event, argument):
    global line
    if not any(frame.f_globals is module for module in modules):
        return None
    if event == "line":
        line += 1
        if line == interrupted:
            handler()
    return trace

default, interrupted, line = sys.getswitchinterval(), 0, 0
while line >= interrupted:
    interrupted, line = interrupted + 1, 0
    other, another = start(), []
    sys.settrace(trace)
    device = start()
    if line < interrupted:
        other.stop()
    else:
        sys.settrace(None)
    assert sys.getswitchinterval() == pytest.approx(0.0005), interrupted
    device.stop()
    sys.settrace(None)
    if another:
        assert sys.getswitchinterval() == pytest.approx(0.0005), interrupted
    for one in [other, *another]:
        one.stop()
    assert sys.getswitchinterval() == pytest.approx(default), interrupted
    assert not _lifecycle.running and not _lifecycle._starting and not _interval._devices
print(interrupted)
"""


@pytest.mark.parametrize("handler", ["stop", "start_another", "start_and_stop", "replace"])
def test_a_signal_handler_may_start_and_stop_devices(handler):
    ended = subprocess.run([sys.executable, "-c", PROGRAM, handler], capture_output=True, text=True, timeout=330)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 30
