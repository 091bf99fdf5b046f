# SPDX-License-Identifier: MIT OR Apache-2.0

"""The end of programs that serve devices, whatever state these are in."""

import signal
import subprocess
import sys
import time

import pytest

# A device under load, in a program of its own: crashes are the program's.
SERVER = """
import atexit, logging, os, signal, sys, threading, time

# Runs after the handlers of ublk.
atexit.register(lambda: print("devices at the end:", driver.devices(), flush=True))
# Takes what a signal's handler still raises.
atexit.register(lambda: None)
atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)

import ublk
from ublk import _device
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
    device = disk(size=1 << 20).start(_driver=driver, **options)
    for _ in range(3):
        threading.Thread(target=load, args=[device], daemon=True).start()
    return device

driver, entered, leave = FakeDriver(), threading.Event(), threading.Event()
print("ready", flush=True)
"""

STYLES = ["", "queues=2", "workers=2"]


class Program:
    """A program that goes on from the one above."""

    def __init__(self, code):
        command = [sys.executable, "-X", "faulthandler", "-c", SERVER + code]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

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
        finally:
            self.process.kill()
            self.process.wait()
        return self.process.returncode, out, err


RAISING_LOG = """
class Raises(logging.Handler):
    def emit(self, record):
        raise {exception}

logging.getLogger("ublk").addHandler(Raises())
device = serve(Disk, {options})
"""


@pytest.mark.parametrize("exception", ["SystemError('mine')", "KeyboardInterrupt()", "SystemExit(3)"])
@pytest.mark.parametrize("options", STYLES)
def test_a_log_handler_that_raises_leaves_no_device(exception, options):
    program = Program(RAISING_LOG.format(exception=exception, options=options) + "time.sleep(0.2)")
    status, out, err = program.end()
    assert status == 0, err
    assert "devices at the end: []" in out, err


@pytest.mark.parametrize("options", STYLES)
def test_sigterm_with_a_log_handler_that_raises_is_a_normal_end(options):
    text = RAISING_LOG.format(exception="ValueError('mine')", options=options)
    program = Program(text + "print('serving', flush=True)\ndevice.wait()")
    program.wait_for("serving")
    time.sleep(0.2)
    program.signal(signal.SIGTERM)
    status, out, err = program.end()
    assert status == 128 + signal.SIGTERM, err
    assert "devices at the end: []" in out, err


def test_signals_that_raise_all_the_time_leave_no_device():
    program = Program("""
def alarm(number, frame):
    raise RuntimeError("from a signal")

device = serve(Disk)
time.sleep(0.1)
# While exit handlers run, and not before.
atexit.register(signal.setitimer, signal.ITIMER_REAL, 0.001, 0.003)
signal.signal(signal.SIGALRM, alarm)
atexit._run_exitfuncs()
""")
    status, out, err = program.end()
    assert status >= 0, err
    assert "devices at the end: []" in out, err


@pytest.mark.parametrize("options", STYLES)
def test_devices_that_nothing_stops_do_not_crash_the_end(options):
    program = Program(f"device = serve(Disk, {options})\ntime.sleep(0.2)\natexit.unregister(_device._stop_all)\n")
    status, out, err = program.end()
    assert status == 0, err
    assert "devices at the end: [0]" in out, err


def test_a_stuck_handler_that_nothing_waits_for_does_not_crash_the_end():
    program = Program("device = serve(Stuck)\nentered.wait()\natexit.unregister(_device._stop_all)\n")
    status, _out, err = program.end()
    assert status == 1, err
    assert "a handler is stuck; exiting immediately" in err


def test_an_exit_handler_that_comes_too_late_starts_no_device():
    program = Program("""
def late():
    try:
        serve(Disk)
    except RuntimeError as error:
        print("late:", error, flush=True)

atexit.unregister(_device._stop_all)
atexit.unregister(ublk._ublk.close_gate)
atexit.register(late)
atexit.register(ublk._ublk.close_gate, 5)
""")
    status, out, err = program.end()
    assert status == 0, err
    assert "late: the interpreter is shutting down" in out


def test_ctrl_c_ends_a_stop_that_waits_for_a_stuck_handler():
    program = Program("""
device = serve(Stuck)
entered.wait()
print("stopping", flush=True)
device.stop(timeout=None)
""")
    program.wait_for("stopping")
    time.sleep(0.5)
    program.signal(signal.SIGINT)
    status, _out, err = program.end(seconds=30)
    assert status == 1, err
    assert "KeyboardInterrupt" in err
    assert "a handler is stuck; exiting immediately" in err


def test_a_device_that_ctrl_c_has_kept_from_stopping_is_stopped_all_the_same():
    program = Program("""
device = serve(Stuck)
entered.wait()
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    device.stop(timeout=None)
except KeyboardInterrupt:
    leave.set()
deadline = time.monotonic() + 30
while (driver.devices() or device in _device._running) and time.monotonic() < deadline:
    time.sleep(0.01)
print("left:", driver.devices(), device in _device._running, flush=True)
""")
    status, out, err = program.end()
    assert status == 0, err
    assert "left: [] False" in out, err


def test_the_second_signal_ends_a_program_that_is_ending():
    program = Program("""
device = serve(Stuck)
entered.wait()
atexit.register(print, "ending", flush=True)
# The first signal would end the wait for the handler: this waits all the same.
_device._expedite_all = lambda: print("expedited", flush=True)
""")
    program.wait_for("ending")
    time.sleep(0.5)
    program.signal(signal.SIGINT)
    program.wait_for("expedited")
    program.signal(signal.SIGINT)
    status, _out, err = program.end(seconds=20)
    assert status == 128 + signal.SIGINT, err


def test_the_first_signal_ends_the_waits_of_a_program_that_is_ending():
    program = Program("device = serve(Stuck)\nentered.wait()\natexit.register(print, 'ending', flush=True)\n")
    program.wait_for("ending")
    time.sleep(0.5)
    begin = time.monotonic()
    program.signal(signal.SIGINT)
    status, _out, err = program.end(seconds=60)
    assert status == 1, err
    assert time.monotonic() - begin < 20
    assert "a handler is stuck; exiting immediately" in err


def test_a_forked_child_dies_of_sigterm_as_its_parent_s_device_is_none_of_its_own():
    program = Program("""
device = serve(Disk)
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(7)
time.sleep(0.2)
os.kill(child, signal.SIGTERM)
print("child:", os.waitpid(child, 0)[1], flush=True)
device.stop()
""")
    status, out, err = program.end()
    assert status == 0, err
    assert f"child: {int(signal.SIGTERM)}" in out


def test_the_last_device_puts_the_signals_back_whatever_thread_stops_it():
    program = Program("""
device = serve(Disk)
assert callable(signal.getsignal(signal.SIGTERM))
thread = threading.Thread(target=device.stop)
thread.start()
thread.join()
deadline = time.monotonic() + 10
while callable(signal.getsignal(signal.SIGTERM)) and time.monotonic() < deadline:
    time.sleep(0.01)
print("handler:", signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, flush=True)
signal.raise_signal(signal.SIGTERM)
""")
    status, out, err = program.end()
    assert "handler: True" in out, err
    assert status == -signal.SIGTERM


def test_a_signal_handler_that_a_program_puts_back_too_late_kills_as_the_default():
    program = Program("""
device = serve(Disk)
found = signal.getsignal(signal.SIGTERM)
device.stop()
signal.signal(signal.SIGTERM, found)
signal.raise_signal(signal.SIGTERM)
""")
    status, _out, err = program.end()
    assert status == -signal.SIGTERM, err


def test_two_times_ctrl_c_under_load_leave_no_device():
    program = Program("""
try:
    with serve(Disk, workers=2) as device:
        print("serving", flush=True)
        device.wait()
except KeyboardInterrupt:
    pass
""")
    program.wait_for("serving")
    time.sleep(0.2)
    program.signal(signal.SIGINT)
    time.sleep(0.01)
    program.signal(signal.SIGINT)
    status, out, err = program.end()
    assert status in (0, 1, -signal.SIGINT, 128 + signal.SIGINT), err
    assert "devices at the end: []" in out, err


def test_a_child_that_ends_by_itself_waits_for_no_thread_of_its_parent():
    program = Program("""
device = serve(Disk, workers=2)
child = os.fork()
if child == 0:
    sys.exit(0)
print("child:", os.waitpid(child, 0)[1], flush=True)
device.stop()
""")
    status, out, err = program.end()
    assert status == 0, err
    assert "child: 0" in out, err


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
inner = Disk(size=1 << 20).start(_driver=driver)
"""

CALLS = {
    "stats": "start(inner.stats)",
    "read": "start(quietly(lambda: driver.read(inner.id, 0, 512)))",
    "invalidate": "extents = Extents(); start(lambda: extents.invalidate(0, 512, 1.0))",
    "disk": "start(lambda: ublk.Mem(1 << 20))",
    "file": "file = open('/dev/null', 'rb'); start(quietly(lambda: ublk.Extent(file, 0, 512)))",
    "handler": """
outer = Outer(size=1 << 20).start(_driver=driver)
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


KEEPING = """
class Pulls(ublk.BlockDevice):
    pass

def pull():
    for request in device.requests():
        kept.append(request)
        entered.set()

kept = []
device = Pulls(size=1 << 20).start(_driver=driver, pull=True)
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


def test_a_kept_request_does_not_keep_the_device_at_exit():
    program = Program("from ublk import _device; _device.STOP_SECONDS = 1.0\n" + KEEPING)
    status, out, err = program.end(30)
    assert status == 0, err
    assert "devices at the end: []" in out, err
    assert "requests unfinished after" in err


@pytest.mark.parametrize(
    ("code", "status"),
    [(KEEPING, 130), (STUCK.format(options="workers=2"), 130), (STUCK.format(options=""), 1)],
    ids=["kept", "workers", "methods"],
)
def test_a_second_ctrl_c_ends_a_program_whose_handler_is_stuck(code, status):
    program = Program(code + "with device:\n    device.wait()\n")
    program.wait_for("serving")
    time.sleep(0.5)
    program.signal(signal.SIGINT)
    # The wait has ended, and the stop waits.
    time.sleep(1)
    begin = time.monotonic()
    program.signal(signal.SIGINT)
    found, _out, err = program.end(40)
    assert time.monotonic() - begin < 20
    # By its exception; by what holds the interpreter, a stuck thread, with 1.
    assert found in (-signal.SIGINT, status, 1), err


def test_a_third_ctrl_c_ends_a_program_at_once():
    program = Program(STUCK.format(options="") + "with device:\n    device.wait()\n")
    program.wait_for("serving")
    for _ in range(3):
        time.sleep(0.5)
        program.signal(signal.SIGINT)
    begin = time.monotonic()
    found, _out, err = program.end(20)
    assert time.monotonic() - begin < 5, err
    assert found in (130, 1), err


# A program that serves a disk without a kernel, in one of three ways.
ENDS = """
import functools, sys
import ublk
from ublk import _cli
from ublk._ublk import FakeDriver

driver = FakeDriver()
start = ublk.BlockDevice.start
ublk.BlockDevice.start = functools.partialmethod(start, _driver=driver)

class Disk(ublk.BlockDevice):
    def read(self, offset, buf):
        buf[:] = bytes(len(buf))

"""
WAITS = "device = Disk(size=1 << 20).start(); print(device.path, flush=True); device.wait()"
RUNS = "ublk.run(Disk(size=1 << 20))"
COMMAND = "sys.exit(_cli.main(['run', '{path}:Disk', '--size', '1M']))"
DISK = """
import ublk

class Disk(ublk.BlockDevice):
    def read(self, offset, buf):
        buf[:] = bytes(len(buf))
"""


@pytest.mark.parametrize(
    ("code", "number", "status"),
    [
        (WAITS, signal.SIGTERM, 143),
        (WAITS, signal.SIGHUP, 129),
        (RUNS, signal.SIGTERM, 0),
        (RUNS, signal.SIGINT, 0),
        (COMMAND, signal.SIGTERM, 0),
        (COMMAND, signal.SIGINT, 0),
    ],
    ids=["program", "program-hup", "run", "run-int", "command", "command-int"],
)
def test_the_exit_status_says_who_handled_the_signal(tmp_path, code, number, status):
    path = tmp_path / "disk.py"
    path.write_text(DISK)
    command = [sys.executable, "-c", ENDS + code.format(path=path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert "/nonexistent/ublkb0" in process.stdout.readline()
        process.send_signal(number)
        _out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
