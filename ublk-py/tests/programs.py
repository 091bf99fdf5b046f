# SPDX-License-Identifier: MIT OR Apache-2.0

"""Programs that serve devices on the stand-in driver, for tests of how they end."""

import os
import signal
import subprocess
import sys

import pytest

# A device under load, in a program of its own: crashes are the program's.
SERVER = """
import atexit, logging, os, signal, sys, threading, time

# Runs after the handlers of ublk. Not in forked children: a thread of their parent may have held the driver's lock.
def show_devices(own=os.getpid()):
    if os.getpid() == own:
        print("devices at the end:", driver.devices(), flush=True)

atexit.register(show_devices)
# Takes what a signal's handler still raises.
atexit.register(lambda: None)
atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)

import ublk
from ublk import _lifecycle
from ublk._driver import using
from ublk._ublk import FakeDriver

class Disk(ublk.BlockDevice):
    def read(self, offset, buf):
        if offset:
            raise ValueError("a mistake")
        buf[:] = bytes(len(buf))

class Stuck(Disk):
    def read(self, offset, buf):
        entered.set()
        leave.wait()

def load(device):
    while True:
        for offset in (0, 4096):
            try:
                driver.read(device.id, offset, 512)
            except OSError:
                pass

def serve(disk, **options):
    with using(driver):
        device = disk(size=1 << 20).start(**options)
    for _ in range(3):
        threading.Thread(target=load, args=[device], daemon=True).start()
    return device

driver, entered, leave = FakeDriver(), threading.Event(), threading.Event()
print("ready", flush=True)
"""

STYLES = ["", "queues=2", "workers=2"]


class Program:
    """A program that goes on from the one above."""

    def __init__(self, code, buffered=False):
        """`buffered`: the program's output is, too."""
        command = [sys.executable, "-X", "faulthandler", "-c", SERVER + code]
        environment = os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"}
        pipe = subprocess.PIPE
        # With a process group of its own, by which `end` kills it.
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, process_group=0)

    def wait_for(self, text):
        for line in self.process.stdout:
            if text in line:
                return
        pytest.fail(self.process.stderr.read())

    def signal(self, number):
        self.process.send_signal(number)

    def end(self, seconds=60):
        """Wait for the end, and give the status with what was printed."""
        try:
            out, err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as expired:
            # Its group: children that it has forked may hang, too.
            os.killpg(self.process.pid, signal.SIGKILL)
            # Bytes, although the pipes are opened as text.
            out, err = ((part or b"").decode(errors="replace") for part in (expired.stdout, expired.stderr))
            pytest.fail(f"the program has not ended within {seconds} s; its output:\n{out}\nits errors:\n{err}")
        finally:
            self.process.kill()
            self.process.stdout.close()
            self.process.stderr.close()
            self.process.wait()
        return self.process.returncode, out, err


# Programs that take a request and do not end it.
KEEPING = """
class Pulls(ublk.BlockDevice):
    pass

def pull():
    for request in device.requests():
        kept.append(request)
        entered.set()

kept = []
with using(driver):
    device = Pulls(size=1 << 20).start(pull=True)
threading.Thread(target=pull, daemon=True).start()
device.wait_ready()
threading.Thread(target=load, args=[device], daemon=True).start()
entered.wait()
print("serving", flush=True)
"""
STUCK = """
device = serve(Stuck, {options})
entered.wait()
print("serving", flush=True)
"""
