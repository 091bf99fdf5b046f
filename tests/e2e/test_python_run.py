# SPDX-License-Identifier: MIT OR Apache-2.0
"""`ublk run`: a class from a file or a module, served, with or without a command."""

import os
import signal
import sys
from pathlib import Path

import pytest
from support import fio, sysfs
from support.blockio import Disk
from support.command import Result
from support.face import Face, device_id
from support.server import HERE, Child
from support.waiting import until

DISKS = str(HERE / "disks.py")
RAM_DISK = "/opt/ublk/examples/ramdisk.py:RamDisk"


def failed(result: Result, *words: str) -> None:
    assert result.status == 1, str(result)
    assert result.out == "", str(result)
    lines = result.err.splitlines()
    assert len(lines) == 1, str(result)
    assert lines[0].startswith("ublk: "), str(result)
    for word in words:
        assert word in result.err, f"{word!r} is not in: {result}"


@pytest.mark.short
def test_the_readme_s_class_is_served_until_ctrl_c(python: Face) -> None:
    with Child([*python.argv, "run", RAM_DISK, "--size", "64M", "-q", "2", "-d", "32", "-n", "3"]) as server:
        path = server.line()
        assert path == "/dev/ublkb3"
        info = python.info(path)
        assert (info["size"], info["queues"], info["depth"]) == (64 << 20, 2, 32)
        with Disk(path, direct=True) as disk:
            disk.write(512, b"\x0f" * 4096)
            assert disk.read(0, 8192) == bytes(512) + b"\x0f" * 4096 + bytes(3584)
        server.signal(signal.SIGINT)
        assert server.wait() in (0, 130), server.log
        assert not os.path.exists(path)
        assert "Traceback" not in server.log


def test_sigterm_ends_it_in_good_order(python: Face) -> None:
    with Child([*python.argv, "run", RAM_DISK, "--size", "1M"]) as server:
        path = server.line()
        server.signal(signal.SIGTERM)
        assert server.wait() in (0, 143), server.log
        assert not os.path.exists(path)
        assert "Traceback" not in server.log


@pytest.mark.parametrize("status", [0, 3])
def test_a_command_s_status_is_returned(python: Face, status: int) -> None:
    result = python.run("run", RAM_DISK, "--size", "1M", "--", "sh", "-c", f"echo hello; exit {status}", check=False)
    assert (result.status, result.out) == (status, "hello\n"), str(result)
    assert python.list() == []


def test_a_command_that_is_killed_counts_as_a_shell_counts(python: Face) -> None:
    result = python.run("run", RAM_DISK, "--size", "1M", "--", "sh", "-c", "kill -KILL $$", check=False)
    assert result.status == 128 + signal.SIGKILL, str(result)


def test_a_command_gets_the_path(python: Face) -> None:
    command = ["sh", "-c", 'test -b "$1" && echo "$1 $2 $UBLK_DEV"', "sh", "{dev}", "of={dev}p1"]
    result = python.run("run", RAM_DISK, "--size", "1M", "--", *command)
    assert result.out == "/dev/ublkb0 of=/dev/ublkb0p1 /dev/ublkb0\n", str(result)


def test_a_command_s_options_are_its_own(python: Face) -> None:
    result = python.run("run", RAM_DISK, "--size", "1M", "--", "echo", "--size", "-n", "--")
    assert result.out == "--size -n --\n", str(result)


def test_a_command_reads_standard_input(python: Face) -> None:
    result = python.run("run", RAM_DISK, "--size", "1M", "--", "cat", input="from outside")
    assert result.out == "from outside", str(result)


def test_a_command_that_does_not_exist(python: Face) -> None:
    result = python.run("run", RAM_DISK, "--size", "1M", "--", "/nonexistent/program", check=False)
    assert result.status in (1, 126, 127), str(result)
    assert "/nonexistent/program" in result.err, str(result)
    assert python.list() == []


@pytest.mark.io_errors
def test_a_signal_ends_the_command_and_the_device(python: Face) -> None:
    with Child(
        [*python.argv, "run", RAM_DISK, "--size", "1M", "--", "sh", "-c", "echo $UBLK_DEV; exec sleep 60"]
    ) as server:
        path = server.line()
        server.signal(signal.SIGTERM)
        assert server.wait() != 0
        assert not os.path.exists(path)


def test_a_command_whose_device_is_deleted_is_told(python: Face) -> None:
    until_gone = "echo $UBLK_DEV; while [ -e $UBLK_DEV ]; do sleep 0.1; done"
    with Child([*python.argv, "run", RAM_DISK, "--size", "1M", "--", "sh", "-c", until_gone]) as server:
        path = server.line()
        python.run("del", "-n", str(device_id(path)))
        assert server.wait() != 0
        assert path in server.log


def test_arguments_reach_the_class(python: Face) -> None:
    result = python.run(
        "run", f"{DISKS}:ForRun", "--size", "1M", "--arg", "label=hello", "--", "head", "-c", "5", "{dev}"
    )
    assert result.out == "hello", str(result)


def test_the_size_takes_suffixes(python: Face) -> None:
    result = python.run("run", f"{DISKS}:ForRun", "--size", "3M", "--", "blockdev", "--getsize64", "{dev}")
    assert result.out == f"{3 << 20}\n", str(result)


def test_a_module_of_the_current_directory(python: Face, tmp_path: Path) -> None:
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "helper.py").write_text("SIZE = 1 << 20\n")
    (package / "disk.py").write_text(
        "import ublk\nfrom mine.helper import SIZE\n"
        "class Zeros(ublk.BlockDevice):\n"
        "    def __init__(self):\n        super().__init__(size=SIZE)\n"
        "    def read(self, offset, buf):\n        buf[:] = bytes(len(buf))\n"
    )
    result = python.run("run", "mine.disk:Zeros", "--", "blockdev", "--getsize64", "{dev}", cwd=tmp_path)
    assert result.out == f"{1 << 20}\n", str(result)


def test_a_file_from_anywhere_with_its_neighbours(python: Face, tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("SIZE = 2 << 20\n")
    (tmp_path / "disk.py").write_text(
        "import ublk\nfrom neighbour import SIZE\n"
        "class Zeros(ublk.BlockDevice):\n"
        "    def __init__(self):\n        super().__init__(size=SIZE)\n"
        "    def read(self, offset, buf):\n        buf[:] = bytes(len(buf))\n"
    )
    result = python.run("run", f"{tmp_path}/disk.py:Zeros", "--", "blockdev", "--getsize64", "{dev}", cwd="/")
    assert result.out == f"{2 << 20}\n", str(result)


def test_a_class_without_write_gives_a_read_only_disk(python: Face) -> None:
    result = python.run("run", f"{DISKS}:ReadOnly", "--", "blockdev", "--getro", "{dev}")
    assert result.out == "1\n", str(result)


@pytest.mark.long
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("/nonexistent.py:RamDisk", ["/nonexistent.py"]),
        ("no.such.module:Disk", ["no.such.module"]),
        (f"{DISKS}:Missing", ["Missing", "disks.py"]),
        (f"{DISKS}:SECTOR", ["SECTOR", "BlockDevice"]),
        (f"{DISKS}:pattern", ["pattern", "BlockDevice"]),
        (DISKS, [":"]),
        (f"{DISKS}:NotReadable", ["NotReadable", "read"]),
    ],
)
def test_something_that_cannot_be_served(python: Face, what: str, words: list[str]) -> None:
    failed(python.run("run", what, check=False), *words)
    assert python.list() == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size", "1000"], ["1000", "512"]),
        (["--size", "0"], ["0"]),
        (["--size", "1M", "-d", "0"], ["depth", "0", "4096"]),
        (["--size", "1M", "-d", "4097"], ["depth", "4097", "4096"]),
        (["--size", "1M", "-q", "0"], ["queues", "0"]),
        (["--size", "1M", "-n", "-1"], ["id", "-1"]),
        (["--arg", "fail=loudly"], ["loudly"]),
        (["--arg", "colour=red"], ["colour"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_impossible_values(python: Face, options: list[str], words: list[str]) -> None:
    failed(python.run("run", f"{DISKS}:ForRun", *options, check=False), *words)
    assert python.list() == []


def test_a_class_that_needs_a_size_says_so(python: Face) -> None:
    failed(python.run("run", RAM_DISK, check=False), "size")


@pytest.mark.parametrize("options", [["--size", "many"], ["--unheard-of"], ["--arg", "novalue"], ["-q", "x"], []])
def test_wrong_usage(python: Face, options: list[str]) -> None:
    what = [f"{DISKS}:ForRun"] if options else []
    result = python.run("run", *what, *options, check=False)
    assert result.status == 2, str(result)
    assert result.out == "", str(result)
    assert "usage" in result.err.lower(), str(result)


def test_a_file_that_does_not_compile_is_named(python: Face, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("class Broken(:\n")
    failed(python.run("run", f"{tmp_path}/broken.py:Broken", check=False), "broken.py", "SyntaxError")


def test_an_id_in_use(python: Face, native: Face) -> None:
    path = native.add("-t", "null", "-n", "5")
    failed(python.run("run", RAM_DISK, "--size", "1M", "-n", "5", check=False), "5")
    assert [device["path"] for device in native.list()] == [path]
    native.run("del", "-a")


def test_the_readme_s_class_is_verified_by_fio(python: Face) -> None:
    with Child([*python.argv, "run", RAM_DISK, "--size", "16M", "-q", "2"]) as server:
        path = server.line()
        job = fio.verify(path, bsrange="512-64k", iodepth=32, size=16 << 20)
        assert job["read"]["io_bytes"] == 16 << 20
        server.signal(signal.SIGINT)
        server.wait()


def test_the_path_is_printed_when_the_output_is_a_pipe(python: Face) -> None:
    # Not only when the buffer is full or the process ends.
    with Child([sys.executable, "-m", "ublk", "run", RAM_DISK, "--size", "1M"]) as server:
        path = server.line(15)
        until(lambda: sysfs.size(path) == 1 << 20, "the disk")
        server.signal(signal.SIGINT)
        server.wait()
