# SPDX-License-Identifier: MIT OR Apache-2.0

"""The end of programs one of whose threads has a lock in a call of the library."""

import subprocess
import sys
import time

import pytest


def test_a_thread_that_asks_too_late_keeps_no_lock():
    """An exit handler of the program, which runs after those of ublk, may want it."""
    program = """
import atexit, threading, time
lock = threading.Lock()

def end():
    time.sleep(0.2)
    with lock:
        print("ended", flush=True)

atexit.register(end)
import ublk.testing

class Disk(ublk.BlockDevice):
    def read(self, offset, buf):
        buf[:] = bytes(len(buf))

file = ublk.testing.open(Disk(size=1 << 20))

def look():
    while True:
        with lock:
            file.device.stats()
        time.sleep(0.001)

threading.Thread(target=look, daemon=True).start()
file.close()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "ended\n"), done
    assert "shutting down" in done.stderr


# Threads that are in a native call with a lock of the program's, which an exit handler wants that runs after ublk's.
LOCKED = """
import atexit, contextlib, threading, time

lock = threading.Lock()

@atexit.register
def last():
    print("the lock is free" if lock.acquire(timeout=20) else "the lock was never released", flush=True)

import ublk
from ublk._driver import using
from ublk._ublk import Extents, FakeDriver

class Disk(ublk.BlockDevice):
    def read(self, offset, buf):
        buf[:] = bytes(len(buf))

class Outer(Disk):
    def read(self, offset, buf):
        with lock:
            driver.read(inner.id, 0, 512)
            inner.stats()

def client(call):
    with contextlib.suppress(RuntimeError):
        while True:
            with lock:
                call()

def start(call):
    threading.Thread(target=client, args=[call], daemon=True).start()

def quietly(call):
    def quiet():
        with contextlib.suppress(OSError):
            call()
    return quiet

driver = FakeDriver()
with using(driver):
    inner = Disk(size=1 << 20).start()
"""

CALLS = {
    "stats": "start(inner.stats)",
    "read": "start(quietly(lambda: driver.read(inner.id, 0, 512)))",
    "invalidate": "extents = Extents(); start(lambda: extents.invalidate(0, 512, 1.0))",
    "disk": "start(lambda: ublk.Mem(1 << 20))",
    "file": "file = open('/dev/null', 'rb'); start(quietly(lambda: ublk.Extent(file, 0, 512)))",
    "handler": """
with using(driver):
    outer = Outer(size=1 << 20).start()
def reads():
    with contextlib.suppress(OSError, RuntimeError):
        while True:
            driver.read(outer.id, 0, 512)
threading.Thread(target=reads, daemon=True).start()
""",
}


@pytest.mark.parametrize("call", CALLS)
def test_a_thread_in_a_native_call_gives_its_locks_back_at_exit(call):
    # A few runs, because it depends on where the thread is in that moment.
    for _ in range(5):
        code = LOCKED + CALLS[call] + "\ntime.sleep(0.1)\ninner.stop()\n"
        begin = time.monotonic()
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        assert result.stdout == "the lock is free\n", result.stderr
        assert time.monotonic() - begin < 20
