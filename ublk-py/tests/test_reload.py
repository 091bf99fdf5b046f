# SPDX-License-Identifier: MIT OR Apache-2.0

"""New code for a running disk."""

import builtins
import errno
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from support import recover_when_free, until

import ublk
from ublk import _cli
from ublk._reload import Reloader, Source

FIRST = """
import ublk

class Disk(ublk.BlockDevice):
    def __init__(self, size=1 << 20):
        super().__init__(size=size)
        self.data = bytearray(size)

    def read(self, offset, buf):
        buf[:] = self.data[offset : offset + len(buf)]

    def write(self, offset, buf):
        self.data[offset : offset + len(buf)] = buf
"""


class Live:
    """A disk that is served from a file of its own."""

    def __init__(self, directory, driver, source=FIRST):
        self.file = directory / "livedisk.py"
        self.file.write_text(source)
        self.driver = driver
        target = self.make()
        self.reloader = Reloader(target, self.make, Source(self.file))
        self.device = self.reloader.start(queues=2)

    def make(self):
        return _cli._make(f"{self.file}:Disk", None, [])

    def change(self, source):
        """Change the file, and have it looked at until it has been noticed."""
        self.file.write_text(source)
        before = self.reloader._source._seen
        for _ in range(3):
            if self.reloader.look():
                return True
            if self.reloader._source._seen != before:
                return False
        raise AssertionError("the exception had no effect")

    def read(self, offset=0):
        return self.driver.read(self.device.id, offset, 512)

    def write(self, data, offset=0):
        self.driver.write(self.device.id, offset, data)


@pytest.fixture
def live(tmp_path, driver, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    served = []

    def make(source=FIRST):
        served.append(Live(tmp_path, driver, source))
        return served[-1]

    yield make
    for one in served:
        one.reloader.close()
    for name in ("livedisk", "livehelper"):
        sys.modules.pop(name, None)


def test_new_code_serves_the_disk_and_finds_its_state(live):
    disk = live()
    disk.write(b"x" * 512)
    assert disk.change(FIRST.replace("buf[:] = self.data", "buf[:] = self.data.upper()"))
    assert disk.read() == b"X" * 512
    disk.write(b"y" * 512, 512)
    assert disk.change(FIRST)
    assert disk.read() == b"x" * 512
    assert disk.read(512) == b"y" * 512


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("class Disk(", "SyntaxError"),
        ("import nonexistent_module", "ModuleNotFoundError"),
        ("raise SystemExit(3)", "3"),
        (FIRST.replace("self.data = bytearray(size)", "1 / 0"), "ZeroDivisionError"),
        (FIRST.replace("def write", "def wrote"), "WRITE"),
        # The kernel takes writes to a disk without a write cache for durable, and sends no flush.
        (FIRST + "\n    def flush(self):\n        pass\n", "no write cache"),
        (FIRST + "\n    def take_over(self, old):\n        raise KeyError('state')\n", "KeyError"),
    ],
)
def test_code_that_does_not_work_leaves_the_old_one_running(live, caplog, broken, words):
    disk = live()
    disk.write(b"x" * 512)
    assert not disk.change(broken)
    assert "the old code continues to serve" in caplog.text
    assert words in caplog.text
    assert disk.read() == b"x" * 512
    # And the next change is noticed again.
    assert disk.change(FIRST.replace("buf[:] = self.data", "buf[:] = self.data.upper()"))
    assert disk.read() == b"X" * 512


def test_attributes_that_only_the_new_class_knows_are_its_constructors(live):
    disk = live()
    disk.write(b"x" * 512)
    new = FIRST.replace("self.data = bytearray(size)", "self.data = bytearray(size)\n        self.mask = 0x20")
    new = new.replace("buf[:] = self.data[offset : offset + len(buf)]", "buf[:] = bytes([self.mask]) * len(buf)", 1)
    assert disk.change(new)
    assert disk.read() == b" " * 512


def test_a_class_may_say_what_it_takes_over(live):
    disk = live()
    disk.write(b"x" * 512)
    take_over = "\n    def take_over(self, old):\n        self.data[:] = old.data.upper()\n"
    assert disk.change(FIRST + take_over)
    assert disk.read() == b"X" * 512


def test_a_module_beside_the_class_is_watched_too(live, tmp_path):
    (tmp_path / "livehelper.py").write_text("FILL = b'1'")
    source = "import livehelper\n" + FIRST.replace(
        "buf[:] = self.data[", "buf[:] = livehelper.FILL * len(buf); self.data["
    )
    disk = live(source)
    assert disk.read() == b"1" * 512
    (tmp_path / "livehelper.py").write_text("FILL = b'2'")
    assert disk.change(source)
    assert disk.read() == b"2" * 512


def test_many_changes_under_load_fail_and_lose_nothing(live):
    disk = live()
    stop, failures, rounds = threading.Event(), [], [0]

    def client():
        try:
            while not stop.is_set():
                data = (rounds[0] % 251).to_bytes(1, "little") * 512
                disk.write(data, 4096)
                assert disk.read(4096) == data
                rounds[0] += 1
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=client)
    thread.start()
    try:
        for number in range(20):
            before = rounds[0]
            assert disk.change(FIRST + f"# {number}\n")
            until(lambda before=before: rounds[0] > before or failures)
            assert not failures
    finally:
        stop.set()
        thread.join(20)
    assert not failures


def test_the_tutorials_log_keeps_writes_during_a_reload(live, tmp_path, monkeypatch):
    tutorial = (Path(__file__).parents[2] / "docs/tutorial.md").read_text()
    (code,) = (
        block for block in re.findall(r"^```python\n(.*?)^```", tutorial, re.M | re.S) if "class LogDisk" in block
    )
    path = tmp_path / "log"
    # The constructor of the new object reads the log while the old one appends to it.
    log = f"""
class Disk(LogDisk):
    def __init__(self):
        super().__init__({str(path)!r}, 64)

    def is_whole(self, record, checksum):
        append_meanwhile()
        return super().is_whole(record, checksum)
"""
    versions = []

    def write():
        versions.append(len(versions) + 1)
        disk.write(bytes([versions[-1]]) * 4096, versions[-1] * 4096)

    def check():
        for version in versions:
            assert disk.driver.read(disk.device.id, version * 4096, 4096) == bytes([version]) * 4096

    monkeypatch.setattr(builtins, "append_meanwhile", write, raising=False)
    disk = live("import ublk\n" + code + log)
    write()
    for number in range(3):
        assert disk.change("import ublk\n" + code + log + f"# {number}\n")
        write()
        check()
    assert len(versions) > 6
    assert os.path.getsize(path) == len(versions) * (24 + 4096)


def test_sigterm_ends_the_program_also_while_new_code_is_made(live, tmp_path):
    disk = live()
    with pytest.raises(SystemExit) as raised:
        disk.change("import signal\nsignal.raise_signal(signal.SIGTERM)\n" + FIRST)
    assert raised.value.code == 143


def test_sigterm_waits_while_the_disk_has_no_server(live, driver):
    disk = live()
    take_over = "\n    def take_over(self, old):\n        import signal\n        signal.raise_signal(signal.SIGTERM)\n"
    take_over += "        self.data = old.data\n"
    disk.write(b"x" * 512)
    with pytest.raises(SystemExit):
        disk.change(FIRST + take_over)
    assert disk.reloader.device.running
    assert disk.read() == b"x" * 512


def hang(live):
    """Serve a disk, and read from it; its handler hangs until `gate` of the module is set, and appends to `late`."""
    hanging = FIRST.replace("buf[:] =", "entered.set(); late.append(gate.wait(30)); buf[:] =", 1)
    events = "import threading\nimport ublk\ngate, entered, late = threading.Event(), threading.Event(), []"
    disk = live(hanging.replace("import ublk", events))
    module = sys.modules["livedisk"]
    client = threading.Thread(target=disk.read)
    client.start()
    assert module.entered.wait(10)
    return disk, module, client


def test_new_code_takes_over_from_a_handler_that_hangs_once_it_returns(live, monkeypatch):
    disk, module, client = hang(live)
    device = disk.device
    patient = threading.Thread(target=device.quiesce)

    def impatient():
        # As if a minute had passed.
        patient.start()
        device.wait(10)
        raise ublk.UblkError(errno.ETIMEDOUT, "a handler does not return")

    monkeypatch.setattr(device, "quiesce", impatient)
    assert not disk.change(FIRST)
    assert not disk.reloader.look()
    assert not disk.reloader.wait(0.01)
    monkeypatch.delattr(device, "quiesce")
    module.gate.set()
    client.join(10)
    patient.join(10)
    until(disk.reloader.look)
    assert disk.read() == bytes(512)


def test_ctrl_c_ends_a_take_over_that_hangs(live):
    disk = live()
    disk.write(b"x" * 512)
    hanging = "\n    def take_over(self, old):\n        entered.set()\n        late.append(leave.wait(30))\n"
    events = "import threading\nimport ublk\nleave, entered, late = threading.Event(), threading.Event(), []"

    new = []

    def interrupt():
        while not hasattr(sys.modules.get("livedisk"), "entered"):
            time.sleep(0.01)
        new.append(sys.modules["livedisk"])
        new[0].entered.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        disk.change(FIRST.replace("import ublk", events) + hanging)
    thread.join()
    assert new[0].late == [], "it was waited for"
    assert disk.read() == b"x" * 512


def test_a_second_signal_ends_a_reload_that_waits_for_a_handler(live, driver):
    disk, module, client = hang(live)
    device = disk.device

    def interrupt():
        device.wait(60)
        os.kill(os.getpid(), signal.SIGINT)
        # One that follows at once counts as the same.
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(SystemExit) as raised:
            disk.change(FIRST)
        assert module.late == [], "it was waited for"
    finally:
        thread.join()
        module.gate.set()
    assert raised.value.code == 128 + signal.SIGTERM
    client.join(20)
    # It was on the way to another server.
    recover_when_free(device.id, disk.make()).stop()
