# SPDX-License-Identifier: MIT OR Apache-2.0

"""Programs that were started without some of stdin, stdout and stderr."""

import os
import subprocess
import sys

import pytest

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
    ended = run(["-m", "ublk", "stat", "-n", "1000000"], (2,), stdout=subprocess.PIPE)
    assert (ended.returncode, ended.stdout) == (1, b"")
