# SPDX-License-Identifier: MIT OR Apache-2.0
"""Servers that the system cannot do without: swap on a disk of ours, with too little memory."""

import contextlib
import json
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import NOBODY, run
from support.face import Face, device_id

MIB = 1 << 20
HUGE = 2 * MIB

# What has to be swapped, at least, in each direction. More does not fit (below); which pages go is the kernel's affair.
SWAPPED = 4 * MIB

# Fills memory with a pattern of each page, and reads it back, with more of it in every round, until so much was
# swapped: what others do not need goes first, and how much that is is unknown.
HOG = """
import mmap, sys
pages, wanted = int(sys.argv[1]), int(sys.argv[2])
MORE = 8192

def swapped():
    counters = dict(line.split() for line in open("/proc/vmstat"))
    return int(counters["pswpout"]), int(counters["pswpin"])

def free():
    return next(int(line.split()[1]) << 10 for line in open("/proc/meminfo") if line.startswith("SwapFree:"))

before = swapped()
areas = [mmap.mmap(-1, pages * 4096)]
for round in range(20):
    for number, memory in enumerate(areas):
        for at in range(0, len(memory), 4096):
            memory[at : at + 16] = (at * 3 + number + round + 1).to_bytes(16, "little")
    for number, memory in enumerate(areas):
        for at in range(0, len(memory), 4096):
            found = int.from_bytes(memory[at : at + 16], "little")
            assert found == at * 3 + number + round + 1, (number, at, found)
    moved = [(now - then) * 4096 for now, then in zip(swapped(), before)]
    if min(moved) >= wanted:
        break
    if free() > 3 * MORE * 4096:
        areas.append(mmap.mmap(-1, MORE * 4096))
print("whole", *moved)
"""


def meminfo(name: str) -> int:
    """A line of /proc/meminfo in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no {name} in /proc/meminfo")


def status(pid: int, name: str) -> str:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return line.split(":", 1)[1].strip()
    raise AssertionError(f"no {name} in /proc/{pid}/status")


@contextlib.contextmanager
def little_memory(left: int) -> Iterator[None]:
    """Takes memory away, as huge pages that are not used, until about so much is available."""
    setting = Path("/proc/sys/vm/nr_hugepages")
    run(["sync"])
    Path("/proc/sys/vm/drop_caches").write_text("3")
    setting.write_text(str(max(meminfo("MemAvailable") - left, 0) // HUGE))
    try:
        yield
    finally:
        setting.write_text("0")


@contextlib.contextmanager
def swap(path: str) -> Iterator[None]:
    run(["mkswap", path])
    run(["swapon", path])
    try:
        yield
    finally:
        run(["swapoff", path], timeout=120)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/swaps").exists(), reason="the kernel was built without swap")
@pytest.mark.time_limit(240)
@pytest.mark.parametrize("words", [[], ["--data", "copy"]], ids=["default", "copy"])
def test_swap_works_while_memory_is_short(words: list[str], native: Face, scratch: Path) -> None:
    image = scratch / "swap.img"
    # Its blocks exist: the file system below needs no memory to find some.
    with image.open("wb") as file:
        for _ in range(256):
            file.write(bytes(MIB))
        os.fsync(file.fileno())
    path = native.add(
        *("-t", "file", "-f", image, "-q", "2", "-d", "32", "--max-io", "128K", "--io", "direct"),
        *("--lock-memory", "--protect", "--cpus", "auto", *words),
    )
    with swap(path), little_memory(400 * MIB):
        need = meminfo("MemAvailable") + 100 * MIB
        hog = run([sys.executable, "-c", HOG, str(need // mmap.PAGESIZE), str(SWAPPED)], timeout=150)
        word, *swapped = hog.out.split()
        assert word == "whole", str(hog)
        assert min(map(int, swapped)) >= SWAPPED, str(hog)
    stat = json.loads(native.run("stat", "-n", str(device_id(path)), "--json").out)["total"]
    assert stat["write"]["bytes"] >= SWAPPED
    assert all(operation["errors"] == 0 for operation in stat.values())
    native.run("del", "-n", str(device_id(path)))


@pytest.mark.short
def test_a_server_can_be_kept_in_memory_and_alive(native_disk, native: Face) -> None:
    path = native_disk("-t", "null", "-d", "16", "--max-io", "64K", "--data", "copy", "--lock-memory", "--protect")
    pid = native.info(path)["pid"]
    # All of its buffers, and the program itself.
    assert int(status(pid, "VmLck").split()[0]) << 10 > 16 * 65536
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "-1000\n"


def test_by_default_a_server_takes_its_chances(native_disk, native: Face) -> None:
    path = native_disk("-t", "null")
    pid = native.info(path)["pid"]
    assert status(pid, "VmLck").split()[0] == "0"
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == Path("/proc/self/oom_score_adj").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--lock-memory"], "locking its memory: "),
        (["--protect"], "protecting itself from the out-of-memory killer: "),
    ],
)
def test_who_may_not_is_told_what_is_needed(words: list[str], says: str, native: Face) -> None:
    result = run(["sh", "-c", f"ulimit -l 64; exec ublk add -t null --foreground {words[0]}"], check=False, **NOBODY)
    assert result.status == 1, str(result)
    assert says in result.err, str(result)
    assert "needs CAP_" in result.err, str(result)
    assert native.list() == []
