# SPDX-License-Identifier: MIT OR Apache-2.0
"""Bad input gets a clear error and changes nothing, from both programs."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import driver, kernel
from support.command import NOBODY, Result, run
from support.face import Face, device_id
from support.waiting import until

pytestmark = pytest.mark.long

# Status 1 is a failure: one line on stderr. Status 2 is wrong usage, which may take more lines.
FAILURE, USAGE = 1, 2


def refused(result: Result, *patterns: str, statuses: tuple[int, ...] = (FAILURE,)) -> None:
    """The command failed, said why in the right form, and printed nothing else."""
    assert result.status in statuses, str(result)
    assert result.out == "", str(result)
    if result.status == FAILURE:
        lines = result.err.splitlines()
        assert len(lines) == 1, str(result)
        assert lines[0].startswith("ublk: "), str(result)
    for pattern in patterns:
        assert re.search(pattern, result.err, re.IGNORECASE), f"/{pattern}/ is not in: {result}"


@pytest.mark.parametrize(
    ("words", "patterns"),
    [
        (["-t", "mem", "--size", "0"], [r"size", r"\b0\b"]),
        (["-t", "mem", "--size", "1000"], [r"size", r"1000", r"512"]),
        (["-t", "mem", "--size", "5000", "--block-size", "4096"], [r"size", r"5000", r"4096"]),
        (["-t", "mem", "--size", "1M", "--block-size", "513"], [r"block size", r"513", r"power of two"]),
        (["-t", "mem", "--size", "1M", "--block-size", "256"], [r"block size", r"256", r"512"]),
        (["-t", "mem", "--size", "1M", "--block-size", "0"], [r"block size", r"\b0\b"]),
        (["-t", "mem", "--size", "1M", "--block-size", "8192"], [r"block size", r"8192", r"4096"]),
        (["-t", "mem", "--size", "1M", "--physical-block-size", "3000"], [r"physical block size", r"3000"]),
        (["-t", "mem", "--size", "1M", "--max-io", "1000"], [r"1000", r"4096"]),
        (["-t", "mem", "--size", "1M", "--max-io", "64M"], [r"67108864|64M"]),
        (["-t", "null", "-d", "0"], [r"depth", r"\b0\b", r"4096"]),
        (["-t", "null", "-d", "4097"], [r"depth", r"4097", r"4096"]),
        (["-t", "null", "-d", "70000"], [r"depth", r"70000", r"4096"]),
        (["-t", "null", "-q", "0"], [r"queues", r"\b0\b"]),
        (["-t", "null", "-q", "5000"], [r"queues", r"5000"]),
        (["-t", "null", "-n", "1048576"], [r"id", r"1048576"]),
        (["-t", "null", "--threads", "0"], [r"threads", r"\b0\b"]),
    ],
    ids=lambda value: " ".join(value) if "-t" in value else "",
)
def test_impossible_values(native: Face, words: list[str], patterns: list[str]) -> None:
    refused(native.run("add", *words, check=False), *patterns, statuses=(FAILURE, USAGE))
    assert native.list() == []


@pytest.mark.parametrize("words", [["-t", "mem", "--size", "1000"], ["-t", "null", "-d", "0"]], ids=" ".join)
def test_impossible_values_are_refused_alike(native: Face, python: Face, words: list[str]) -> None:
    ours, theirs = (face.run("add", *words, check=False) for face in (native, python))
    assert (ours.status, ours.out, ours.err) == (theirs.status, theirs.out, theirs.err)
    assert ours.status != 0


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["frobnicate"],
        ["add"],
        ["add", "-t", "tape"],
        ["add", "-t", "mem", "--size", "many"],
        ["add", "-t", "mem", "--size", "-1"],
        ["add", "-t", "mem", "--block-size", "x"],
        ["add", "-t", "null", "-q", "-1"],
        ["add", "-t", "null", "-d", "many"],
        ["add", "-t", "null", "-n", "x"],
        ["add", "-t", "null", "--unheard-of"],
        ["add", "-t", "file"],
        ["add", "-t", "file", "-f", "/etc/hosts", "--io", "psychic"],
        ["del"],
        ["del", "-n", "0", "-a"],
        ["list", "surplus"],
    ],
    ids=lambda words: " ".join(words) or "nothing",
)
def test_wrong_usage(native: Face, words: list[str]) -> None:
    result = native.run(*words, check=False)
    assert result.status == USAGE, str(result)
    assert result.out == "", str(result)
    # The usage, or what is wrong and where the usage is.
    assert re.search(r"usage:|--help", result.err, re.IGNORECASE), str(result)


@pytest.mark.parametrize("words", [["frobnicate"], ["add", "-t", "tape"], ["del"]], ids=" ".join)
def test_wrong_usage_is_refused_alike(native: Face, python: Face, words: list[str]) -> None:
    ours, theirs = (face.run(*words, check=False) for face in (native, python))
    assert (ours.status, ours.out) == (theirs.status, theirs.out) == (USAGE, "")


def test_the_native_command_says_where_run_is(native: Face) -> None:
    result = native.run("run", "ramdisk.py:RamDisk", check=False)
    assert (result.status, result.out) == (USAGE, ""), str(result)
    assert "python3 -m ublk run" in result.err, str(result)


@pytest.mark.short
def test_a_file_that_does_not_exist(face: Face) -> None:
    refused(
        face.run("add", "-t", "file", "-f", "/nonexistent/disk.img", check=False),
        r"/nonexistent/disk\.img",
        r"no such file",
    )


@pytest.mark.parametrize("path", ["/tmp", "/dev/null", "/proc/version"])
def test_something_that_is_no_disk(native: Face, path: str) -> None:
    refused(native.run("add", "-t", "file", "-f", path, check=False), re.escape(path))


def test_an_empty_file(native: Face, tmp_path: Path) -> None:
    file = tmp_path / "empty"
    file.touch()
    refused(native.run("add", "-t", "file", "-f", file, check=False), r"size|empty")


def test_a_file_with_half_a_sector(native: Face, tmp_path: Path) -> None:
    file = tmp_path / "odd"
    file.write_bytes(bytes(1000))
    refused(native.run("add", "-t", "file", "-f", file, check=False), r"1000", r"512")
    assert file.read_bytes() == bytes(1000)


def test_more_than_the_file_has(native: Face, tmp_path: Path) -> None:
    file = tmp_path / "small"
    file.write_bytes(bytes(4096))
    refused(native.run("add", "-t", "file", "-f", file, "--size", "1M", check=False), r"1048576|1M", r"4096")
    assert file.stat().st_size == 4096


def test_a_block_device_that_is_mounted(native: Face) -> None:
    with open("/proc/self/mounts") as mounts:
        root = next(line.split()[0] for line in mounts if line.split()[1] == "/")
    refused(native.run("add", "-t", "file", "-f", root, check=False), re.escape(root), r"mounted|in use|busy")


def test_an_id_in_use(face: Face, native) -> None:
    path = native.add("-t", "null", "-n", "5")
    before = native.list()
    refused(face.run("add", "-t", "mem", "--size", "1M", "-n", "5", check=False), r"\b5\b", r"in use|exists")
    assert native.list() == before
    native.run("del", "-n", str(device_id(path)))


@pytest.mark.parametrize("words", [["del", "-n", "9"], ["list", "-n", "9"]], ids=" ".join)
def test_a_device_that_does_not_exist(face: Face, words: list[str]) -> None:
    refused(face.run(*words, check=False), r"\b9\b", r"no such device")


def test_del_goes_on_behind_an_id_that_does_not_exist(face: Face, native) -> None:
    path = native.add("-t", "null", "-n", "3")
    refused(face.run("del", "-n", "2", "-n", "3", check=False), r"\b2\b")
    assert not os.path.exists(path)


@pytest.mark.parametrize(
    "words", [["add", "-t", "null"], ["del", "-n", "0"], ["list"], ["features"]], ids=lambda words: words[0]
)
def test_no_permission(face: Face, words: list[str]) -> None:
    refused(
        face.run(*words, check=False, cwd="/", **NOBODY),
        r"/dev/ublk-control",
        r"permission denied",
        r"root|CAP_SYS_ADMIN",
    )


@pytest.fixture
def no_driver() -> Iterator[None]:
    """A machine whose driver is not loaded."""
    driver.unload()
    yield
    driver.load()


@pytest.mark.parametrize(
    "words", [["add", "-t", "null"], ["del", "-a"], ["list"], ["features"]], ids=lambda words: words[0]
)
def test_a_missing_driver(face: Face, no_driver: None, words: list[str]) -> None:
    refused(face.run(*words, check=False), r"/dev/ublk-control", r"modprobe ublk_drv")


def test_the_driver_can_be_unloaded_after_use(face: Face) -> None:
    path = face.add("-t", "null", "-q", "2")
    face.run("del", "-n", str(device_id(path)))
    # Also asserts that no reference was leaked.
    holders = Path("/sys/module/ublk_drv/refcnt")
    until(lambda: holders.read_text().strip() == "0", "the driver's reference count to be 0")


@pytest.mark.skipif(kernel.VERSION < (6, 6), reason="Linux 6.6 brought the switch")
def test_io_uring_forbidden(face: Face) -> None:
    switch = Path("/proc/sys/kernel/io_uring_disabled")
    before = switch.read_text()
    switch.write_text("2")
    try:
        refused(face.run("add", "-t", "null", check=False), r"io_uring", r"io_uring_disabled")
    finally:
        switch.write_text(before)


def test_a_log_that_cannot_be_written(native: Face) -> None:
    refused(native.run("add", "-t", "null", "--log", "/nonexistent/log", check=False), r"/nonexistent/log")
    assert native.list() == []


def test_standard_output_that_is_full(face: Face) -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [*face.argv, "add", "-t", "null"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=30
        )
    # A caller that cannot get the path has no use for the device.
    assert ended.returncode == FAILURE, ended
    assert ended.stderr.startswith("ublk: "), ended
    until(lambda: face.list() == [], "the device's end")


def test_the_program_works_without_an_environment(face: Face) -> None:
    program = shutil.which(face.argv[0]) or face.argv[0]
    environment = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    result = run([program, *face.argv[1:], "list", "--json"], env=environment)
    assert result.out.strip() == "[]"
