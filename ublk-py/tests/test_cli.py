# SPDX-License-Identifier: MIT OR Apache-2.0

"""The command line of ``ublk run``, as far as it needs no driver."""

import argparse
import subprocess

import pytest

import ublk
from ublk import _cli


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("4k", 4096), ("64KiB", 65536), ("1.5G", 3 << 29), ("2TB", 2 << 40), ("7B", 7)],
)
def test_sizes_have_suffixes(text, size):
    assert _cli.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1X", "1.3", "1..5G", "0x10", "1GG"])
def test_nonsense_is_no_size(text):
    with pytest.raises(argparse.ArgumentTypeError):
        _cli.parse_size(text)


def test_servers_run_no_module_of_the_working_directory(tmp_path, monkeypatch):
    programs = []
    monkeypatch.setattr(_cli._ublk, "main", lambda _arguments, program, _extra: programs.append(program) or 0)
    assert _cli.main(["list"]) == 0
    (tmp_path / "asyncio.py").write_text("print('not this one', flush=True)")
    done = subprocess.run([*programs[0], "--version"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, "not this one" in done.stdout) == (0, False), done.stderr


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "mydisk.py"
    path.write_text(
        "import ublk\n"
        "class Disk(ublk.BlockDevice):\n"
        "    def __init__(self, size, name='x', level=1):\n"
        "        super().__init__(size=size)\n"
        "        self.name, self.level = name, level\n"
        "    def read(self, offset, buf): pass\n"
        "other = 3\n"
    )
    return path


def test_a_class_is_made_from_a_file_with_its_arguments(disk):
    made = _cli._make(f"{disk}:Disk", 4096, [("name", "y"), ("level", 2)])
    assert (made.size, made.name, made.level) == (4096, "y", 2)


def test_arguments_are_literals_or_strings():
    assert _cli._parse_argument("n=3") == ("n", 3)
    assert _cli._parse_argument("n=a b") == ("n", "a b")
    assert _cli._parse_argument("n={'a': [1]}") == ("n", {"a": [1]})


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("Disk", "neither FILE.py:CLASS nor package.module:CLASS"),
        ("/nonexistent.py:Disk", "/nonexistent.py: no such file"),
        ("{disk}:Nothing", "mydisk.py does not define Nothing"),
        ("{disk}:other", "not a subclass of ublk.BlockDevice"),
        ("no.such.module:Disk", "importing no.such.module: ModuleNotFoundError"),
        ("{disk}:Disk", "does it need --size"),
    ],
)
def test_what_cannot_be_served_is_status_1_with_the_reason(disk, capsys, what, words):
    assert _cli.main(["run", what.format(disk=disk)]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["run"], ["run", "--depth", "x", "a:B"], ["run", "a:B", "--"], ["frobnicate"]])
def test_wrong_usage_is_status_2(arguments, capfd):
    assert _cli.main(arguments) == 2


def test_the_help_knows_run(capfd):
    assert _cli.main(["--help"]) == 0
    assert "Serve a block device written in Python" in capfd.readouterr().out


class Asleep:
    """A command that sleeps in the kernel, even when killed, until the disk is gone."""

    def __init__(self):
        self.disk_is_gone = self.is_interrupted = self.is_collected = False

    def poll(self):
        return None

    def send_signal(self, number): ...

    def kill(self): ...

    def wait(self, timeout=None):
        if not self.is_interrupted:
            self.is_interrupted = True
            raise KeyboardInterrupt
        assert timeout is not None, "it waits without a limit"
        if not self.disk_is_gone:
            raise subprocess.TimeoutExpired("command", timeout)
        self.is_collected = True
        return -9


@pytest.mark.parametrize("fails", [False, True])
def test_a_command_that_sleeps_in_the_disk_does_not_keep_it(monkeypatch, fails):
    child = Asleep()

    class Device:
        path = "/dev/ublkb0"

        def stop(self):
            child.disk_is_gone = True
            if fails:
                raise ublk.UblkError(5, "requests unfinished")

    monkeypatch.setattr(_cli.subprocess, "Popen", lambda *_, **__: child)
    with pytest.raises(ublk.UblkError if fails else KeyboardInterrupt):
        _cli._run_command(["command"], Device, None)
    assert child.is_collected
