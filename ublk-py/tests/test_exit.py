# SPDX-License-Identifier: MIT OR Apache-2.0

"""The end of programs that serve devices, whatever state these are in."""

import signal
import time

import pytest
from programs import KEEPING, STYLES, Program

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


@pytest.mark.parametrize("options", STYLES)
def test_devices_that_nothing_stops_do_not_crash_the_end(options):
    program = Program(f"device = serve(Disk, {options})\ntime.sleep(0.2)\natexit.unregister(_lifecycle.stop_all)\n")
    status, out, err = program.end()
    assert status == 0, err
    assert "devices at the end: [0]" in out, err


def test_a_stuck_handler_that_nothing_waits_for_does_not_crash_the_end():
    # What the program has printed is in a buffer.
    text = "device = serve(Stuck)\nentered.wait()\natexit.unregister(_lifecycle.stop_all)\nprint('a result')\n"
    status, out, err = Program(text, buffered=True).end()
    assert status == 1, err
    assert "a handler is stuck; exiting immediately" in err
    assert "a result" in out


def test_an_exit_handler_that_comes_too_late_starts_no_device():
    program = Program("""
def late():
    try:
        serve(Disk)
    except RuntimeError as error:
        print("late:", error, flush=True)

atexit.unregister(_lifecycle.stop_all)
atexit.unregister(ublk._ublk.close_gate)
atexit.register(late)
atexit.register(ublk._ublk.close_gate, 5)
""")
    status, out, err = program.end()
    assert status == 0, err
    assert "late: the interpreter is shutting down" in out


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


def test_a_program_that_does_not_end_is_reported_once():
    # Its child has the pipes, too.
    program = Program("print('begun', flush=True)\nos.fork()\ntime.sleep(1000)")
    program.wait_for("begun")
    with pytest.raises(pytest.fail.Exception, match="has not ended within 1 s"):
        program.end(1)
    assert program.process.returncode == -signal.SIGKILL


def test_a_kept_request_does_not_keep_the_device_at_exit():
    program = Program("from ublk import _lifecycle; _lifecycle.STOP_SECONDS = 1.0\n" + KEEPING)
    status, out, err = program.end(30)
    assert status == 0, err
    assert "devices at the end: []" in out, err
    assert "requests unfinished after" in err
