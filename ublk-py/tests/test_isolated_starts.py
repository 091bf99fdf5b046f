# SPDX-License-Identifier: MIT OR Apache-2.0

"""Starts of isolated devices that are given up."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from support import SOON, start_isolated, until

import ublk
from ublk import _isolated, _lifecycle, _start


class Disk(ublk.BlockDevice):
    """In the other process its device is made, and then something happens to the start."""

    def __init__(self, directory, fate):
        super().__init__(size=1 << 20)
        self.directory, self.fate = str(directory), fate

    def __setstate__(self, state):
        self.__dict__ = state
        begin, fate = _start._begin, self.fate

        def begin_or_not(device):
            with open(os.path.join(self.directory, "made"), "w") as file:
                file.write(str(os.getpid()))
            if fate == "waits until it is stopped":
                while not device._native.stopped:
                    time.sleep(0.01)
            elif fate == "hangs":
                threading.Event().wait()
            elif fate == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            begin(device)

        _start._begin = begin_or_not

    def read(self, offset, buf):
        buf[:] = bytes(len(buf))


@pytest.fixture
def kernel(monkeypatch):
    """The system's devices as this program sees them; note which it deletes, and the processes that it starts."""
    found = SimpleNamespace(deleted=[], processes=[])
    initialize = _isolated.RemoteDevice.__init__

    def remember(self, *arguments):
        initialize(self, *arguments)
        found.processes.append(self._process)

    def delete(id, force):
        found.deleted.append(id)

    monkeypatch.setattr(_isolated.RemoteDevice, "__init__", remember)
    # The driver of the other process, which is asked there.
    monkeypatch.setattr(_isolated.RemoteDevice, "_fake", property(lambda self: False, lambda self, fake: None), False)
    ublk_ = SimpleNamespace(device=lambda id: {"pid": None}, delete=delete)
    monkeypatch.setattr(_isolated, "_ublk", ublk_)
    return found


class Large(Disk):
    """More than fits into a pipe."""

    def __init__(self, directory):
        super().__init__(directory, "")
        self.data = bytes(4 << 20)


def start(disk, **options):
    return start_isolated(disk, id=7, **options)


@pytest.mark.parametrize("recoverable", [False, True])
def test_a_process_that_dies_in_its_start_leaves_no_device(kernel, tmp_path, recoverable):
    with pytest.raises(ublk.UblkError, match="was killed by SIGKILL before the disk was there"):
        start(Disk(tmp_path, "dies"), recoverable=recoverable)
    assert kernel.deleted == [7]


def test_a_start_that_takes_too_long_leaves_no_device(kernel, tmp_path, monkeypatch):
    def wait(self, seconds, *, _wait=_isolated.Questions.wait_for_start):
        # However long the process takes to get there.
        until((tmp_path / "made").exists)
        return _wait(self, seconds)

    monkeypatch.setattr(_isolated.Questions, "wait_for_start", wait)
    monkeypatch.setattr(_isolated, "_START_SECONDS", 0.5)
    monkeypatch.setattr(_isolated, "_GIVE_UP_SECONDS", 0.5)
    with pytest.raises(ublk.UblkError, match=r"does not answer after 0\.5 s"):
        start(Disk(tmp_path, "hangs"))
    assert kernel.deleted == [7]
    assert kernel.processes[0].exitcode == -signal.SIGKILL


@pytest.mark.parametrize("suspended", [False, True], ids=["running", "suspended"])
def test_ctrl_c_while_a_device_starts_has_it_stopped_there(kernel, tmp_path, suspended):
    def interrupt():
        until((tmp_path / "made").exists)
        if suspended:
            os.kill(kernel.processes[0].pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        start(Disk(tmp_path, "waits until it is stopped"))
    # By itself, and without a device.
    assert kernel.processes[0].exitcode == 0
    assert kernel.deleted == []


def test_a_start_interrupted_twice_before_there_is_a_process_raises_that(monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_lifecycle, "end_with_worker", interrupted)
        patch.setattr(_isolated.RemoteDevice, "_kill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            start(Disk("", ""))
        patch.undo()
    for thread in threading.enumerate():
        if thread.name == "ublk-stop":
            thread.join(SOON)
    assert _lifecycle.running == set()


@pytest.mark.parametrize("fate", ["waits until it is stopped", "hangs"])
def test_a_process_that_starts_a_device_ends_with_its_program(tmp_path, fate):
    path = tmp_path / "program.py"
    path.write_text(f"""
import test_isolated_starts as tests

if __name__ == "__main__":
    tests.start(tests.Disk({str(tmp_path)!r}, {fate!r}))
""")
    here = os.path.dirname(os.path.abspath(__file__))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    with subprocess.Popen([sys.executable, str(path)], env=environment) as program:
        until(lambda: (tmp_path / "made").exists() and (tmp_path / "made").read_text())
        program.kill()
    child = int((tmp_path / "made").read_text())
    try:
        until(lambda: not is_running(child))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# The process gets a signal before it reads anything, with which the program goes on as it says.
SIGNALLED = """
import os, signal, sys, threading, time
import multiprocessing.util
import test_isolated_starts as tests
from ublk import _isolated

def spawn(*arguments, _spawn=multiprocessing.util.spawnv_passfds):
    pid = _spawn(*arguments)
    if b"spawn_main" in b" ".join(map(os.fsencode, arguments[1])):
        os.kill(pid, int(sys.argv[2]))
        spawned.append(pid)
        is_spawned.set()
    return pid

multiprocessing.util.spawnv_passfds = spawn
spawned, is_spawned = [], threading.Event()
"""
START = """
if __name__ == "__main__":
    try:
        tests.start(tests.Large(sys.argv[1]))
    except BaseException as error:
        print(type(error).__name__, error, flush=True)
    print(is_spawned.is_set() and not tests.is_running(spawned[0]))
"""


def run(tmp_path, code, number=0):
    """Run a program that starts a device; return its status and what it prints. It must end by itself."""
    path = tmp_path / "program.py"
    path.write_text(code)
    here = os.path.dirname(os.path.abspath(__file__))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    command = [sys.executable, str(path), str(tmp_path), str(int(number))]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as program:
        try:
            out, err = program.communicate(timeout=SOON)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
    return program.returncode, out.splitlines(), err


def test_a_script_without_a_guard_gets_the_hint_for_a_large_disk(tmp_path):
    code = "import sys, test_isolated_starts as tests; tests.start(tests.Large(sys.argv[1]))"
    status, _out, err = run(tmp_path, code)
    assert status == 1
    assert 'does so under `if __name__ == "__main__":`' in err


# As what the process has forked does.
SHARED = """
def initialize(self, *arguments, _initialize=_isolated.RemoteDevice.__init__):
    _initialize(self, *arguments)
    os.dup(self._theirs[0].fileno())

_isolated.RemoteDevice.__init__ = initialize
"""


@pytest.mark.parametrize("more", ["", SHARED], ids=["alone", "others-have-its-pipe"])
def test_a_process_that_dies_before_it_has_the_disk_is_reported(tmp_path, more):
    _status, out, _err = run(tmp_path, SIGNALLED + more + START, signal.SIGKILL)
    assert "was killed by SIGKILL before the disk was there" in out[0]
    assert out[1] == "True"


def test_a_pipe_to_a_process_that_dies_kills_no_program(tmp_path):
    code = f"{SIGNALLED}\nsignal.signal(signal.SIGPIPE, signal.SIG_DFL)\n{START}"
    status, out, _err = run(tmp_path, code, signal.SIGKILL)
    assert status == 0
    assert "was killed by SIGKILL before the disk was there" in out[0]


def test_the_start_of_a_suspended_process_takes_no_longer_than_it_may(tmp_path):
    code = f"{SIGNALLED}\n_isolated._START_SECONDS = 0.5\n{START}"
    _status, out, _err = run(tmp_path, code, signal.SIGSTOP)
    assert "does not answer after 0.5 s" in out[0]
    assert out[1] == "True"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_gives_the_start_of_a_suspended_process_up(tmp_path, number):
    interrupt = f"""
def interrupt():
    is_spawned.wait()
    time.sleep(0.5)
    os.kill(os.getpid(), {int(number)})

if __name__ == "__main__":
    threading.Thread(target=interrupt, daemon=True).start()
"""
    _status, out, _err = run(tmp_path, SIGNALLED + interrupt + START, signal.SIGSTOP)
    assert out[0].split()[0] in ("KeyboardInterrupt", "Terminated")
    assert out[1] == "True"
