# SPDX-License-Identifier: MIT OR Apache-2.0

"""The end of programs whose standard files or log handlers block."""

import signal
import sys
import time

import pytest
from programs import STYLES, Program

# Nothing reads this program's errors.
FULL_STDERR = """
import fcntl

_lifecycle.STOP_SECONDS = 1.0
fcntl.fcntl(2, fcntl.F_SETFL, os.O_NONBLOCK)
try:
    while True:
        os.write(2, b"x")
except BlockingIOError:
    pass
fcntl.fcntl(2, fcntl.F_SETFL, 0)
"""

# The first of its handler's mistakes blocks the thread that logs it.
MISTAKEN = """
class Mistaken(Disk):
    def read(self, offset, buf):
        entered.set()
        raise ValueError("a mistake")

device = serve(Mistaken, {options})
entered.wait()
print("serving", flush=True)
"""


@pytest.mark.parametrize("options", STYLES)
@pytest.mark.parametrize("stops", [False, True], ids=["exits", "stops"])
def test_a_full_stderr_does_not_keep_a_program_from_its_end(options, stops):
    wait = "try:\n    device.wait()\nfinally:\n    device.stop(timeout=1)\n" if stops else "device.wait()\n"
    program = Program(FULL_STDERR + MISTAKEN.format(options=options) + wait)
    try:
        program.wait_for("serving")
        # The thread that logs the mistake blocks by then.
        time.sleep(1)
        program.signal(signal.SIGTERM)
        assert program.process.wait(60) == 1
    finally:
        program.process.kill()
        program.end()


def test_a_full_stderr_does_not_keep_a_program_with_a_stuck_handler_from_its_end():
    text = "device = serve(Stuck)\nentered.wait()\natexit.unregister(_lifecycle.stop_all)\nprint('a result')\n"
    program = Program(FULL_STDERR + text, buffered=True)
    try:
        assert program.process.wait(60) == 1
    finally:
        program.process.kill()
        out = program.end()[1]
    assert "a result" in out


# A client whose requests are served without a mistake.
FINE = """
class Fine(ublk.BlockDevice):
    def read(self, offset, buf):
        buf[:] = bytes(len(buf))

with using(driver):
    device = Fine(size=1 << 20).start()
driver.read(device.id, 0, 512)
"""


@pytest.mark.parametrize("buffered", [False, True])
def test_a_full_stderr_does_not_change_a_normal_end(buffered):
    # The warning about the device that is still running finds no room.
    program = Program(FULL_STDERR + FINE, buffered=buffered)
    try:
        assert program.process.wait(60) == 0
    finally:
        program.process.kill()
        out = program.end()[1]
    assert "devices at the end: []" in out


@pytest.mark.skipif((3, 12) <= sys.version_info < (3, 12, 3), reason="no thread can be started at the end of a program")
def test_a_log_handler_that_blocks_does_not_keep_a_program_from_its_end():
    # Its lock is one that `logging.shutdown` waits for.
    program = Program(
        FINE
        + """
class Blocks(logging.Handler):
    def emit(self, record):
        leave.wait()

logging.getLogger("ublk").addHandler(Blocks())
"""
    )
    status, _out, err = program.end()
    assert status == 1, err


# A child process of a handler, which returns.
FORKS = """
class Forks(Disk):
    def read(self, offset, buf):
        buf[:] = bytes(len(buf))
        children.append(os.fork())

class ForksInTasks(Forks):
    async def read(self, offset, buf):
        super().read(offset, buf)

children = []
with using(driver):
    device = {kind}(size=1 << 20).start({options})
driver.read(device.id, 0, 512)
threading.Timer(40, os.kill, [children[0], signal.SIGKILL]).start()
print("child:", os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]), flush=True)
os._exit(0)
"""

# A thread that waits for room in stderr, with the lock of its buffer, in the system call write().
LOCKED_STDERR = """
def fill():
    sys.stderr.write("x" * 100_000)

sys.stderr = open(2, "w", closefd=False)
writer = threading.Thread(target=fill, daemon=True)
writer.start()
# The system call, and its descriptor.
while open(f"/proc/self/task/{writer.native_id}/syscall").read().split()[:2] != ["1", "0x2"]:
    time.sleep(0.01)
"""


@pytest.mark.parametrize(
    ("kind", "options"),
    [("Forks", ""), ("Forks", "workers=1"), ("ForksInTasks", "")],
    ids=["methods", "workers", "tasks"],
)
@pytest.mark.parametrize("locked", ["", LOCKED_STDERR], ids=["full", "locked"])
def test_a_full_stderr_does_not_keep_a_forked_child_from_its_end(kind, options, locked):
    program = Program(FULL_STDERR + locked + FORKS.format(kind=kind, options=options))
    try:
        assert "child: 1\n" in program.process.stdout
    finally:
        program.process.kill()
        program.end()


BLOCK = """
import builtins, types

def block(*_, **__):
    while True:
        time.sleep(1000)

def fail(*_, **__):
    raise SystemError("mine")

"""

# What may keep a program from the report of a stuck handler.
OBSTACLES = {
    "a flush that blocks": "sys.stdout = types.SimpleNamespace(flush=block)",
    "a flush that fails": "sys.stdout = types.SimpleNamespace(flush=fail)",
    "a lock": LOCKED_STDERR,
    "no threads": "threading.Thread.start = fail",
    "signals": """
signal.signal(signal.SIGALRM, signal.default_int_handler)
atexit.register(signal.setitimer, signal.ITIMER_REAL, 1e-3, 1e-3)
""",
}

# The same, where only the last exit handler reports it.
LATE_OBSTACLES = {
    "an import that blocks": "builtins.__import__ = block",
    "an import that fails": "builtins.__import__ = fail",
    "a report that blocks": "_lifecycle.exit_stuck = block",
    "a report that fails": "_lifecycle.exit_stuck = fail",
}
UNREGISTER = """
atexit.unregister(_lifecycle.stop_all)
atexit.unregister(ublk._ublk.close_gate)
atexit.register(ublk._ublk.close_gate, 0.5)
"""


@pytest.mark.parametrize(
    "code",
    [
        *(pytest.param(code, id=name) for name, code in OBSTACLES.items()),
        *(pytest.param(UNREGISTER + code, id=f"{name}, late") for name, code in (OBSTACLES | LATE_OBSTACLES).items()),
    ],
)
def test_a_stuck_handler_ends_a_program_whatever_blocks_its_report(code):
    stuck = "_lifecycle.STOP_SECONDS = 1.0\ndevice = serve(Stuck)\nentered.wait()\n"
    program = Program(FULL_STDERR + BLOCK + stuck + code, buffered=True)
    try:
        assert program.process.wait(120) == 1
    finally:
        program.process.kill()
        program.end()


def test_a_full_stderr_does_not_keep_devices_from_being_removed():
    # As in the process that removes the devices of one whose handler was stuck.
    program = Program(
        FULL_STDERR + "from ublk._log import print_error\nprint_error('removing')\nprint('next', flush=True)"
    )
    try:
        assert program.process.wait(60) == 0
    finally:
        program.process.kill()
        out = program.end()[1]
    assert "next" in out


# Panics: the limit is negative.
PANIC = """
try:
    ublk._ublk.close_gate(-1.0)
except BaseException as error:
    print(type(error).__name__, flush=True)
os._exit(0)
"""


def test_a_panic_is_printed():
    status, out, err = Program(PANIC).end()
    assert (status, "PanicException" in out) == (0, True), err
    assert "panicked at" in err


def test_a_panic_does_not_wait_for_room_in_stderr():
    program = Program(FULL_STDERR + PANIC)
    try:
        assert program.process.wait(60) == 0
    finally:
        program.process.kill()
        program.end()
