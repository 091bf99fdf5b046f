# SPDX-License-Identifier: MIT OR Apache-2.0

"""The end of a program while one of its threads starts devices."""

import subprocess
import sys

PROGRAM = """
import atexit, threading, time

# Runs after the handlers of ublk.
atexit.register(lambda: print("devices at the end:", driver.devices(), flush=True))

import ublk
from ublk._ublk import FakeDriver

class Disk(ublk.BlockDevice):
    def read(self, offset, buf):
        buf[:] = bytes(len(buf))

def start_and_stop():
    devices = []
    while True:
        devices.append(Disk(size=1 << 20).start(_driver=driver))
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
