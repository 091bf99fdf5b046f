# SPDX-License-Identifier: MIT OR Apache-2.0
"""Many devices in one process: few threads, little memory, no work while nothing happens."""

import os
import time
from pathlib import Path

import pytest
from support.blockio import Disk
from support.command import run
from support.face import Face
from support.pace import DEBUG_KERNEL, patience
from support.processes import is_running, threads
from support.waiting import until

COUNT = int(os.environ.get("UBLK_COUNT", "40" if DEBUG_KERNEL else "200"))


def resident(pid: int) -> int:
    """A process's memory in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def processor_time(pid: int) -> int:
    """Ticks of the clock that a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.long
@pytest.mark.time_limit(60 + COUNT * 3)
def test_one_process_serves_many_devices(native: Face) -> None:
    path = native.add("-t", "null", "--no-partition-scan")
    time.sleep(patience(5))
    alone = resident(native.info(path)["pid"])
    native.run("del", "-a")
    result = native.run("add", "-t", "null", "--count", str(COUNT), "--no-partition-scan", timeout=30 + COUNT)
    paths = result.out.split()
    assert len(set(paths)) == COUNT
    devices = native.list()
    assert {device["path"] for device in devices} == set(paths)
    (pid,) = {device["pid"] for device in devices}
    assert len(threads(pid)) <= 4
    for path in (paths[0], paths[-1]):
        with Disk(path, direct=True) as disk:
            disk.write(0, bytes(4096))

    # What udev's look at each disk has touched goes back, once nothing happens.
    run(["udevadm", "settle", "--timeout", str(30 + COUNT)], timeout=40 + COUNT)

    def per_device() -> float:
        return (resident(pid) - alone) / (COUNT - 1)

    until(lambda: per_device() < 64 << 10, "the return of memory", 20)
    print(f"{COUNT} devices: {len(threads(pid))} threads, {per_device() / 1024:.1f} KiB each")

    def at_rest() -> bool:
        before = processor_time(pid)
        time.sleep(3)
        return processor_time(pid) - before <= 1

    # On a busy machine udev may still look at the disks.
    until(at_rest, "three seconds without work", 60)
    native.run("del", "-a", timeout=60 + COUNT)
    until(lambda: not is_running(pid), "the server's end")


def test_memory_of_a_burst_is_given_back(native: Face) -> None:
    path = native.add("-t", "null", "-q", "2")
    pid = native.info(path)["pid"]
    before = resident(pid)
    with Disk(path, direct=True) as disk:
        for n in range(300):
            disk.write(n * (512 << 10), bytes(512 << 10))
    # Two periods of two seconds without a request.
    until(lambda: resident(pid) < before + (4 << 20), "the return of the memory", 15)
    native.run("del", "-a")


@pytest.mark.long
def test_a_server_that_runs_out_of_descriptors_fails_and_leaves_nothing(native: Face) -> None:
    limited = ["prlimit", "--nofile=64:64", *native.argv, "add", "-t", "null", "--count", "60"]
    result = run(limited, check=False, timeout=120)
    assert result.status == 1
    assert "EMFILE" in result.err, result.err
    assert native.list() == []


@pytest.mark.long
def test_the_usual_limit_of_open_files_is_raised_as_far_as_it_may_be(native: Face) -> None:
    limited = ["prlimit", "--nofile=64:512", *native.argv, "add", "-t", "null", "--count", "60"]
    result = run(limited, timeout=120)
    assert len(result.out.split()) == 60
    native.run("del", "-a", timeout=120)
