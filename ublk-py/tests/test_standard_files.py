# SPDX-License-Identifier: MIT OR Apache-2.0

"""Programs that were started without some of stdin, stdout and stderr."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from programs import Program

from ublk import _lifecycle, _log

# A handler that is stuck when the program ends, which the library reports.
STUCK = """
import atexit, os, sys, threading, time
{before}
import ublk
from ublk import _lifecycle
from ublk._driver import using
from ublk._ublk import FakeDriver

class Stuck(ublk.BlockDevice):
    def __init__(self, path):
        super().__init__(size=1 << 20)
        self.file = file if "file" in globals() else os.open(path, os.O_RDWR)

    def read(self, offset, buf):
        entered.set()
        while True:
            time.sleep(1)

driver, entered = FakeDriver(), threading.Event()
disk = Stuck(sys.argv[1])
with using(driver):
    device = disk.start()
threading.Thread(target=lambda: driver.read(device.id, 0, 512), daemon=True).start()
entered.wait()
assert disk.file == {file}
atexit.unregister(_lifecycle.stop_all)
atexit.unregister(ublk._ublk.close_gate)
atexit.register(ublk._ublk.close_gate, 0.1)
"""


def run(arguments, closed, **options):
    """Run Python with closed descriptors."""

    def close():
        for descriptor in closed:
            os.close(descriptor)

    return subprocess.run([sys.executable, *arguments], preexec_fn=close, timeout=120, check=False, **options)


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 2), (0, 1, 2)], ids=str)
def test_closed_standard_files_are_dev_null(tmp_path, closed):
    code = """
import os, sys
import ublk
with open(sys.argv[1], "w") as file:
    for descriptor in map(int, sys.argv[2:]):
        assert os.get_inheritable(descriptor)
        # Neither fails.
        os.write(descriptor, b"x"), os.read(descriptor, 1)
        print(os.readlink(f"/proc/self/fd/{descriptor}"), file=file)
    print(file.fileno() > 2, file=file)
"""
    path = tmp_path / "found"
    assert run(["-c", code, path, *map(str, closed)], closed).returncode == 0
    assert path.read_text().split() == ["/dev/null"] * len(closed) + ["True"]


def test_open_standard_files_are_left_alone():
    code = "import os, ublk; print([os.readlink(f'/proc/self/fd/{n}') for n in range(3)])"
    ended = run(["-c", code], (), stdin=subprocess.PIPE, capture_output=True, text=True)
    assert ended.stdout.count("pipe:") == 3, ended


@pytest.mark.parametrize("before", ["", "file = os.open(sys.argv[1], os.O_RDWR)"], ids=["after", "before"])
def test_no_message_is_written_into_a_disk(tmp_path, before):
    # The file may have been opened before the library was imported, too.
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    code = STUCK.format(before=before, file=2 if before else 3)
    assert run(["-c", code, image], (2,)).returncode == 1
    assert image.read_bytes() == bytes(1 << 20)


def test_the_command_works_without_stderr():
    ended = run(["-m", "ublk", "run", "nothing"], (2,), stdout=subprocess.PIPE)
    assert (ended.returncode, ended.stdout) == (1, b"")
    ended = run(["-m", "ublk", "stat", "-n", "1000000"], (2,), stdout=subprocess.PIPE)
    assert (ended.returncode, ended.stdout) == (1, b"")


@pytest.mark.parametrize("missing", ["stdout", "stderr"])
def test_a_stuck_handler_ends_a_program_without_standard_files(missing):
    program = Program(f"""
removals = []
_lifecycle.leave_removal = lambda devices: removals.append(devices) or os.write(1, b"removal\\n") and ""
_lifecycle.STOP_SECONDS = 0.1
device = serve(Stuck)
entered.wait()
sys.{missing} = None
""")
    status, out, err = program.end()
    assert (status, out.count("removal")) == (1, 1), err


class Left:
    """A device whose handler is stuck when the program ends."""

    def __init__(self, id, recovery=None):
        self._native = SimpleNamespace(id=id, on_kernel=True, stopped=False, recovery=recovery)


def test_one_process_removes_a_device(monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: started.append(command[6:]))
    monkeypatch.setattr(_lifecycle, "_left", set())
    one, other, recoverable = Left(1), Left(2), Left(3, "queue")
    texts = [_lifecycle.leave_removal([one, recoverable]) for _ in range(2)]
    assert started == [["1"]]
    assert texts[0] == texts[1]
    assert "ublk.recover(3, ...); its devices are removed" in texts[0]
    _lifecycle.leave_removal([one, other])
    assert started == [["1"], ["2"]]


def test_a_removal_that_did_not_start_is_started_again(monkeypatch):
    def fail(*_, **__):
        raise OSError("no process")

    monkeypatch.setattr(_lifecycle, "_left", set())
    one, started = Left(1), []
    monkeypatch.setattr(subprocess, "Popen", fail)
    assert "no process" in _lifecycle.leave_removal([one])
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: started.append(command))
    _lifecycle.leave_removal([one])
    assert len(started) == 1


def test_a_removal_without_stderr_looks_at_all_devices():
    code = f"import sys\nsys.stderr = None\n{_lifecycle._REMOVER}\nprint('over')"
    package = os.path.dirname(os.path.dirname(_lifecycle.__file__))
    ended = run(["-c", code, package, "1", "1048570", "1048571"], (), stdin=subprocess.DEVNULL, capture_output=True)
    assert (ended.returncode, ended.stdout) == (0, b"over\n"), ended.stderr


def test_without_stderr_nothing_is_printed_to_stdout(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    _log.print_error("a message")
    try:
        raise ValueError("a mistake")
    except ValueError:
        _log._print()
    monkeypatch.delattr(sys, "stderr")
    _log.print_error("a message")
    assert capsys.readouterr().out == ""
