# SPDX-License-Identifier: MIT OR Apache-2.0
"""Servers of the Rust program come and go, in good order and otherwise."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from support import fio, sysfs
from support.backends import image
from support.blockio import Disk, Tasks, together
from support.command import run
from support.face import device_id
from support.pace import patience
from support.processes import is_running
from support.server import Child
from support.waiting import until


def gone(path: str) -> bool:
    return not os.path.exists(path) and not os.path.exists(path.replace("ublkb", "ublkc"))


@pytest.mark.short
def test_add_returns_when_the_disk_can_be_used(native) -> None:
    path = native.add("-t", "mem", "--size", "1M")
    with Disk(path, direct=True) as disk:
        assert disk.read(0, 4096) == bytes(4096)
    native.run("del", "-n", str(device_id(path)))
    assert gone(path)


def test_the_daemon_leaves_its_caller_alone(native) -> None:
    # `run` fails when the daemon keeps a pipe of its caller open. Its directory and session count too.
    path = native.add("-t", "null", cwd="/tmp")
    pid = native.info(path)["pid"]
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.getsid(pid) == pid
    native.run("del", "-n", str(device_id(path)))
    until(lambda: not is_running(pid), "the daemon's end")


def test_foreground_serves_until_the_device_is_deleted(native) -> None:
    with Child([*native.argv, "add", "-t", "null", "--foreground"]) as server:
        path = server.line()
        assert native.info(path)["pid"] == server.pid
        native.run("del", "-n", str(device_id(path)))
        assert server.wait() == 0, server.log
        assert gone(path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_foreground_ends_in_good_order_by(number: signal.Signals, native) -> None:
    with Child([*native.argv, "add", "-t", "null", "--foreground"]) as server:
        path = server.line()
        server.signal(number)
        assert server.wait() == 0, server.log
        assert gone(path)


@pytest.mark.io_errors
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
@pytest.mark.parametrize(
    "kind", [pytest.param("null", marks=pytest.mark.long), pytest.param("mem", marks=pytest.mark.long), "file"]
)
def test_a_signal_in_the_middle_of_io_removes_the_device(kind: str, number: int, native, scratch: Path) -> None:
    more = {"null": [], "mem": ["--size", "64M"], "file": ["-f", image(scratch, 64 << 20)]}[kind]
    path = native.add("-t", kind, "-q", "2", *more)
    pid = native.info(path)["pid"]
    with fio.Load(path, numjobs=2) as load:
        load.wait_until_busy()
        os.kill(pid, number)
        until(lambda: not is_running(pid), "the daemon's end", 15)
        assert gone(path)
        load.wait()


@pytest.mark.short
@pytest.mark.io_errors
@pytest.mark.parametrize("kind", ["null", "mem", "file"])
def test_sigkill_in_the_middle_of_io_hangs_nobody(kind: str, native, scratch: Path) -> None:
    more = {"null": [], "mem": ["--size", "64M"], "file": ["-f", image(scratch, 64 << 20)]}[kind]
    path = native.add("-t", kind, "-q", "2", *more)
    pid = native.info(path)["pid"]
    with fio.Load(path, numjobs=2) as load:
        load.wait_until_busy()
        os.kill(pid, signal.SIGKILL)
        assert load.wait(15) != 0, "fio did not notice that its disk is gone"
    until(lambda: native.list()[0]["state"] == "DEAD", "the state DEAD")
    native.run("del", "--dead")
    assert native.list() == []
    assert gone(path)


@pytest.mark.io_errors
@pytest.mark.parametrize("end", ["del", "SIGKILL"])
@pytest.mark.parametrize("io", ["direct", pytest.param("buffered", marks=pytest.mark.long)])
def test_what_a_busy_disk_has_acknowledged_is_in_its_file(end: str, io: str, native, scratch: Path) -> None:
    file = image(scratch, 16 << 20)
    path = native.add("-t", "file", "-f", file, "-q", "2", "--io", io)
    pid = native.info(path)["pid"]
    fio.verify(path, size="8m", bs="4k", iodepth=16)
    # Each writer has blocks of its own, and numbers what it writes to them.
    first, writers, blocks = 8 << 20, 4, 64
    written = [[(0, 0)] * blocks for _ in range(writers)]

    def write(writer: int) -> None:
        with Disk(path, direct=True) as disk:
            for number in range(1, 1 << 30):
                block = number % blocks
                acknowledged, _ = written[writer][block]
                written[writer][block] = (acknowledged, number)
                place = first + (writer * blocks + block) * 4096
                try:
                    disk.write(place, number.to_bytes(4, "little") * 1024)
                except OSError:
                    return
                written[writer][block] = (number, number)

    tasks = Tasks()
    for writer in range(writers):
        tasks.start(write, writer)
    until(lambda: all(acknowledged for each in written for acknowledged, _ in each), "a write of each block")
    if end == "del":
        native.run("del", "--force", "-n", str(device_id(path)))
    else:
        os.kill(pid, signal.SIGKILL)
    tasks.join()
    if end == "SIGKILL":
        until(lambda: native.list()[0]["state"] == "DEAD", "the state DEAD")
        native.run("del", "--dead")
    content = file.read_bytes()[first:]
    for writer, states in enumerate(written):
        for block, (acknowledged, sent) in enumerate(states):
            at = (writer * blocks + block) * 4096
            found = content[at : at + 4096]
            assert found in {n.to_bytes(4, "little") * 1024 for n in (acknowledged, sent)}, (writer, block)
    path = native.add("-t", "file", "-f", file)
    fio.verify(path, size="8m", bs="4k", iodepth=16, verify_only=1)
    native.run("del", "-n", str(device_id(path)))


def test_del_dead_spares_the_living(native) -> None:
    alive, dead = native.add("-t", "null"), native.add("-t", "null")
    os.kill(native.info(dead)["pid"], signal.SIGKILL)
    until(lambda: native.info(dead)["state"] == "DEAD", "the state DEAD")
    native.run("del", "--dead")
    assert [device["path"] for device in native.list()] == [alive]
    native.run("del", "-n", str(device_id(alive)))


@pytest.mark.short
@pytest.mark.io_errors
def test_del_unused_spares_a_busy_disk(native) -> None:
    path = native.add("-t", "mem", "--size", "64M")
    with fio.Load(path) as load:
        load.wait_until_busy()
        refused = native.run("del", "--unused", "-n", str(device_id(path)), check=False)
        assert refused.status == 1, str(refused)
        assert "fio" in refused.err, str(refused)
        assert "--force" in refused.err, str(refused)
        # It has lost nothing by that.
        load.wait_until_busy(sysfs.requests(path) + 200)
        started = time.monotonic()
        native.run("del", "--force", "-n", str(device_id(path)))
        assert time.monotonic() - started < patience(15)
        assert gone(path)
        assert load.wait(15) != 0


def test_del_of_a_mounted_disk_names_the_mount(native, tmp_path: Path) -> None:
    path = native.add("-t", "mem", "--size", "64M")
    run(["mkfs.ext4", "-q", path])
    run(["mount", path, tmp_path])
    refused = native.run("del", "-a", check=False)
    assert refused.status == 1, str(refused)
    assert str(tmp_path) in refused.err, str(refused)
    (tmp_path / "file").write_text("still there")
    run(["umount", tmp_path])
    native.run("del", "-a")
    assert gone(path)


def test_del_while_the_disk_is_open_holds_up_nobody(native) -> None:
    path = native.add("-t", "mem", "--size", "1M")
    with Disk(path, direct=True):
        # A person at a terminal may have mistaken the number.
        number = str(device_id(path))
        refused = run(["script", "-qec", f"ublk del -n {number}", "/dev/null"], check=False, timeout=20)
        assert refused.status == 1, str(refused)
        assert f"process {os.getpid()}" in refused.out, str(refused)
        assert native.info(path)["state"] == "LIVE"
        removed = native.run("del", "-n", number, timeout=20)
        assert f"process {os.getpid()}" in removed.err, str(removed)
    until(lambda: gone(path), "the nodes' end")


def test_del_by_a_test_suite_at_a_terminal_is_not_a_persons(native) -> None:
    path = native.add("-t", "mem", "--size", "1M")
    with Disk(path, direct=True):
        # As blktests: its tests inherit the terminal as their input, and their output goes to files.
        run(["script", "-qec", f"ublk del -n {device_id(path)} > /dev/null 2>&1", "/dev/null"], timeout=20)
    until(lambda: gone(path), "the nodes' end")


def test_del_async_does_not_wait_for_the_last_holder(native) -> None:
    path = native.add("-t", "mem", "--size", "1M")
    node = os.open(path.replace("ublkb", "ublkc"), os.O_PATH)
    try:
        native.run("del", "--async", "-n", str(device_id(path)))
        until(lambda: not os.path.exists(path), "the disk's end")
    finally:
        os.close(node)
    until(lambda: gone(path), "the nodes' end")


def test_a_second_del_says_that_there_is_no_device(native) -> None:
    path = native.add("-t", "null")
    number = str(device_id(path))
    native.run("del", "-n", number)
    again = native.run("del", "-n", number, check=False)
    assert again.status == 1, str(again)
    assert again.err.startswith("ublk: "), str(again)
    assert number in again.err, str(again)


def test_del_by_several_at_the_same_time(native) -> None:
    path = native.add("-t", "null")
    statuses = []
    number = str(device_id(path))
    together([lambda: statuses.append(native.run("del", "-n", number, check=False).status)] * 4)
    assert 0 in statuses
    assert set(statuses) <= {0, 1}
    assert gone(path)


@pytest.mark.short
@pytest.mark.time_limit(200)
def test_del_dead_spares_devices_in_the_making(native) -> None:
    paths: list[str] = []
    failed: list[str] = []
    done = threading.Event()

    def sweep() -> None:
        while not done.is_set():
            swept = native.run("del", "--dead", check=False, timeout=60)
            if swept.status:
                failed.append(str(swept))

    def add() -> None:
        for _ in range(5):
            paths.append(native.add("-t", "null", settle=False))

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        together([add] * 3, seconds=150)
    finally:
        done.set()
        sweeper.join()
    assert len(paths) == 15
    assert {device["path"] for device in native.list()} == set(paths)
    assert not failed, failed
    native.run("del", "-a", timeout=60)


@pytest.mark.time_limit(120)
def test_del_dead_minds_no_device_that_goes_away(native) -> None:
    done = threading.Event()

    def churn() -> None:
        while not done.is_set():
            path = native.add("-t", "null", settle=False)
            native.run("del", "--force", "-n", str(device_id(path)))

    churners = [threading.Thread(target=churn) for _ in range(2)]
    for churner in churners:
        churner.start()
    try:
        for _ in range(10):
            native.run("del", "--dead", timeout=60)
    finally:
        done.set()
        for churner in churners:
            churner.join()
    assert native.list() == []


@pytest.mark.long
@pytest.mark.io_errors
@pytest.mark.time_limit(300)
def test_del_force_spares_other_disks_of_a_server(native) -> None:
    """A server that hangs is killed only if no other disk in use goes with it."""
    hung, used = native.run("add", "-t", "mem", "--size", "1M", "--count", "2").out.split()
    pid = native.info(hung)["pid"]
    with Disk(used, direct=True):
        os.kill(pid, signal.SIGSTOP)
        reader = subprocess.Popen(["dd", f"if={hung}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct"])
        try:
            until(lambda: sysfs.in_flight(hung) != 0, "a request that the server does not end")
            force = ("del", "--force", "-n", str(device_id(hung)))
            refused = native.run(*force, check=False, timeout=90)
            assert refused.status == 1, str(refused)
            assert used in refused.err, str(refused)
            assert f"process {pid}" in refused.err, str(refused)
            assert is_running(pid)
            native.run(*force, "-n", str(device_id(used)), timeout=150)
            assert not is_running(pid)
        finally:
            if is_running(pid):
                os.kill(pid, signal.SIGCONT)
            reader.wait(60)
    until(lambda: native.list() == [], "the end of both devices")


def test_del_of_several(native) -> None:
    first, second, third = (native.add("-t", "null") for _ in range(3))
    native.run("del", "-n", str(device_id(first)), "-n", str(device_id(third)))
    assert [device["path"] for device in native.list()] == [second]
    native.run("del", "-a")
    assert native.list() == []


@pytest.mark.io_errors
def test_ids_are_used_again_at_once(native) -> None:
    # Also while udev still reads from the device that ends.
    for _ in range(5):
        path = native.add("-t", "null", "-n", "7", settle=False)
        assert path == "/dev/ublkb7"
        native.run("del", "-n", "7")


def test_devices_are_added_at_the_same_time(native) -> None:
    paths = []
    together([lambda: paths.append(native.add("-t", "null"))] * 4)
    assert len(set(paths)) == 4
    assert {device["path"] for device in native.list()} == set(paths)
    native.run("del", "-a")


def test_the_io_thread_count_can_be_limited(native) -> None:
    path = native.add("-t", "null", "-q", "2", "--threads", "1")
    queues = sysfs.queue_cpus(path)
    with Disk(path, direct=True) as disk:
        together([lambda: disk.read(0, 4096)] * 2, cpus=[min(cpus) for cpus in queues])
    native.run("del", "-n", str(device_id(path)))


def test_messages_of_the_daemon_go_to_the_log_that_was_named(native, tmp_path: Path) -> None:
    log = tmp_path / "ublk.log"
    path = native.add("-t", "null", "--log", log)
    pid = native.info(path)["pid"]
    assert os.readlink(f"/proc/{pid}/fd/2") == str(log)
    native.run("del", "-n", str(device_id(path)))


@pytest.mark.io_errors(r"EXT4-fs .*ublkb\d+\)", r"Aborting journal on device ublkb", r"JBD2: .* ublkb")
def test_a_mounted_disk_whose_server_dies_can_be_cleaned_up(native, tmp_path: Path) -> None:
    path = native.add("-t", "mem", "--size", "64M")
    run(["mkfs.ext4", "-q", path])
    mount = tmp_path / "mount"
    mount.mkdir()
    run(["mount", path, mount])
    os.kill(native.info(path)["pid"], signal.SIGKILL)
    until(lambda: native.list()[0]["state"] == "DEAD", "the state DEAD")
    run(["umount", mount])
    native.run("del", "--dead")
    assert gone(path)
