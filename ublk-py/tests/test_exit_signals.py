# SPDX-License-Identifier: MIT OR Apache-2.0

"""The end of programs that serve devices, by signals."""

import signal
import subprocess
import sys
import time

import pytest
from programs import KEEPING, STUCK, Program


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
while (driver.devices() or device in _lifecycle.running) and time.monotonic() < deadline:
    time.sleep(0.01)
print("left:", driver.devices(), device in _lifecycle.running, flush=True)
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
_lifecycle._expedite_all = lambda: print("expedited", flush=True)
""")
    program.wait_for("ending")
    time.sleep(0.5)
    program.signal(signal.SIGINT)
    program.wait_for("expedited")
    # One that follows at once counts as the same.
    time.sleep(1)
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
        time.sleep(1)
        program.signal(signal.SIGINT)
    begin = time.monotonic()
    found, _out, err = program.end(20)
    assert time.monotonic() - begin < 5, err
    assert found in (130, 1), err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_hangup_with_the_first_signal_fails_no_request(number):
    program = Program(f"""
class Slow(Disk):
    def write(self, offset, buf):
        entered.set()
        leave.wait()

def write():
    try:
        driver.write(device.id, 0, bytes(512))
        print("acknowledged", flush=True)
    except OSError as error:
        print("failed", error, flush=True)

def send():
    entered.wait()
    os.kill(os.getpid(), {int(number)})
    # Later than any signal that counts as the first one because it follows at once.
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(0.5)
    leave.set()

with using(driver), Slow(size=1 << 20).start(workers=1) as device:
    for target in (write, send):
        threading.Thread(target=target, daemon=True).start()
    device.wait()
""")
    status, out, err = program.end()
    assert "acknowledged" in out, (out, err)
    assert status == 128 + number


# A program that serves a disk without a kernel, in one of three ways.
ENDS = """
import sys
import ublk
from ublk import _cli, _driver
from ublk._ublk import FakeDriver

driver = FakeDriver()
stand_in = _driver.using(driver)
stand_in.__enter__()

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
