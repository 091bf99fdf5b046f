# SPDX-License-Identifier: MIT OR Apache-2.0
"""Disks that outlive their servers: killed ones, and ones that hand over under load."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import driver, fio, sysfs
from support.backends import image
from support.blockio import Disk
from support.command import Result, run
from support.face import Face, device_id
from support.features import has
from support.pace import patience
from support.processes import is_running
from support.waiting import until

# How often a disk changes its server in one test; more by hand.
ROUNDS = int(os.environ.get("UBLK_ROUNDS", "3"))
SIZE = 64 << 20

needs_quiesce = pytest.mark.skipif(not has("QUIESCE"), reason="QUIESCE_DEV came with Linux 6.16")
needs_fail_io = pytest.mark.skipif(not has("USER_RECOVERY_FAIL_IO"), reason="it came with Linux 6.13")

every_recovery = pytest.mark.parametrize(
    "recovery", ["queue", "reissue", pytest.param("fail-io", marks=[needs_fail_io])]
)
# The driver of 6.12 needs up to half a minute to notice a death, ours on 6.1 less.
NOTICE = 45.0


def kill_server(native: Face, path: str) -> None:
    pid = native.info(path)["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_running(pid), "the server's end")


def state_file(path: str) -> Path:
    return Path("/run/ublk", os.path.basename(path) + ".json")


@pytest.mark.short
@pytest.mark.io_errors
@every_recovery
@pytest.mark.time_limit(120 + ROUNDS * 60)
def test_a_killed_server_is_followed_by_another_and_nothing_is_lost(recovery: str, native, scratch: Path) -> None:
    file = image(scratch, SIZE)
    path = native.add("-t", "file", "-f", file, "-q", "2", "--recovery", recovery)
    for round in range(ROUNDS):
        # What was acknowledged before the death is there after it; with reissue no request fails at all.
        fio.verify(path, size="8m", offset=f"{round % 7 * 8}m", bs="4k", iodepth=16)
        with fio.Load(path, offset="56m", size="8m", rw="randwrite", numjobs=1) as load:
            load.wait_until_busy(sysfs.requests(path) + 100)
            kill_server(native, path)
            assert native.run("recover", "-n", str(device_id(path)), timeout=NOTICE + 15).out == f"{path}\n"
            if recovery == "reissue":
                load.wait_until_busy(sysfs.requests(path) + 100)
        fio.verify(path, size="8m", offset=f"{round % 7 * 8}m", bs="4k", iodepth=16, verify_only=1)
    info = native.info(path)
    assert (info["state"], info["recovery"]) == ("LIVE", recovery)
    native.run("del", "-n", str(device_id(path)))
    assert not state_file(path).exists()


@pytest.mark.short
@needs_quiesce
@pytest.mark.time_limit(120 + ROUNDS * 30)
def test_a_new_server_takes_a_mounted_busy_disk_over_without_a_failure(native, scratch: Path, tmp_path: Path) -> None:
    file = image(scratch, SIZE)
    path = native.add("-t", "file", "-f", file, "-q", "2", "--recovery")
    run(["mkfs.ext4", "-q", path])
    run(["mount", path, tmp_path])
    try:
        servers = {native.info(path)["pid"]}
        # It writes for as long as servers change, and then reads everything back.
        with fio.Steady(path, tmp_path, blocks=6144, seconds=10 + ROUNDS * 5) as load:
            for _ in range(ROUNDS):
                load.wait_until_busy(sysfs.requests(path) + 50)
                assert native.run("upgrade", "-n", str(device_id(path))).out == f"{path}\n"
                servers.add(native.info(path)["pid"])
            assert load.wait(90 + ROUNDS * 10) == 0
        assert len(servers) == ROUNDS + 1
        assert sum(map(is_running, servers)) == 1
    finally:
        run(["umount", tmp_path])
    run(["e2fsck", "-f", "-n", path])
    native.run("del", "-n", str(device_id(path)))


@pytest.mark.long
@needs_quiesce
@pytest.mark.parametrize("kind", ["copy", "get-data", "user-copy", "zero-copy", "auto-zero-copy"])
@pytest.mark.parametrize("batch", ["on", "off"])
def test_a_disk_is_handed_over_whichever_way_its_data_moves(kind: str, batch: str, native, scratch: Path) -> None:
    if batch == "on" and (kind == "get-data" or not has("BATCH_IO")):
        pytest.skip("there are no such batches")
    if batch == "on" and not driver.is_bundled():
        pytest.skip("Linux's driver fails requests of a batch device whose server was asked to leave")
    if kind.endswith("zero-copy") and not has("AUTO_BUF_REG"):
        pytest.skip("the driver has no zero copy here")
    file = image(scratch, SIZE)
    path = native.add("-t", "file", "-f", file, "-q", "2", "--recovery", "queue", "--data", kind, "--batch", batch)
    with fio.Load(path, rw="randwrite", bs="16k") as load:
        for _ in range(2):
            load.wait_until_busy(sysfs.requests(path) + 100)
            native.run("upgrade", "-n", str(device_id(path)))
            info = native.info(path)
            assert (info["data"], info["batch"]) == (kind, batch == "on")
        load.wait_until_busy(sysfs.requests(path) + 100)
    fio.verify(path, size="8m", bs="4k", iodepth=16)
    native.run("del", "-n", str(device_id(path)))


@needs_quiesce
def test_requests_wait_while_a_disk_has_no_server(native, scratch: Path) -> None:
    path = native.add("-t", "file", "-f", image(scratch, SIZE), "--recovery")
    number = str(device_id(path))
    native.run("quiesce", "-n", number)
    assert native.info(path)["state"] == "QUIESCED"
    reader = run_in_background(["dd", f"if={path}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct"])
    # A request that is held cannot be seen, only that its sender does not end. It has to end before this does.
    time.sleep(1)
    waited = reader.poll() is None
    native.run("recover", "-n", number)
    assert reader.wait(patience(10)) == 0
    assert waited
    native.run("del", "-n", number)


def run_in_background(argv: list[str]) -> subprocess.Popen:
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@needs_quiesce
def test_a_relative_path_is_found_again(native, scratch: Path) -> None:
    image(scratch, SIZE)
    path = native.add("-t", "file", "-f", "disk.img", "--recovery", cwd=scratch)
    for _ in range(2):
        native.run("upgrade", "-n", str(device_id(path)), cwd="/")
    native.run("del", "-n", str(device_id(path)))


def recover_in_python(number: str, file: Path, **options) -> Result:
    call = f"ublk.recover({number}, ublk.File({str(file)!r}), **{options}).quiesce()"
    return run([sys.executable, "-c", f"import ublk\n{call}"], check=False)


@needs_quiesce
def test_a_file_that_took_the_name_of_the_disks_file_is_refused(native, scratch: Path) -> None:
    file = image(scratch, SIZE)
    path = native.add("-t", "file", "-f", file, "--recovery")
    number = str(device_id(path))
    with Disk(path, direct=True) as disk:
        disk.write(0, b"\x5a" * 4096)
    native.run("quiesce", "-n", number)
    # A restore ends with a rename. Without the state file, only the driver knows which file it was.
    old = scratch / "old.img"
    file.rename(old)
    image(scratch, SIZE)
    state_file(path).unlink()
    words = ["recover", "-n", number, "-t", "file", "-f", file]
    refused = native.run(*words, check=False, timeout=NOTICE + 15)
    assert refused.status == 1, str(refused)
    assert "another one has taken its name" in refused.err, str(refused)
    assert "--accept-replaced" in refused.err, str(refused)
    refused = recover_in_python(number, file)
    assert refused.status == 1, str(refused)
    assert "accept_replaced=True" in refused.err, str(refused)
    assert native.info(path)["state"] == "QUIESCED"
    # The disk's own file, under any name.
    recovered = recover_in_python(number, old)
    assert recovered.status == 0, str(recovered)
    recovered = recover_in_python(number, file, accept_replaced=True)
    assert recovered.status == 0, str(recovered)
    # From then on, the state file counts, which records the accepted file.
    native.run(*words, "--accept-replaced", timeout=NOTICE + 15)
    native.run("quiesce", "-n", number)
    native.run("recover", "-n", number, timeout=NOTICE + 15)
    with Disk(path, direct=True) as disk:
        assert disk.read(0, 4096) == bytes(4096)
    native.run("del", "-n", number)


@needs_quiesce
def test_an_upgrade_that_cannot_work_leaves_the_old_server(native, scratch: Path) -> None:
    path = native.add("-t", "file", "-f", image(scratch, SIZE), "--recovery")
    pid = native.info(path)["pid"]
    for program in ("/nonexistent", "/bin/false", "/etc/passwd"):
        refused = native.run("upgrade", "-n", str(device_id(path)), "--program", program, check=False)
        assert refused.status == 1, str(refused)
        assert program in refused.err, str(refused)
    # The backing file cannot be written to, or is too short.
    file = scratch / "disk.img"
    for spoil, mend in (
        (["chattr", "+i", file], ["chattr", "-i", file]),
        (["truncate", "-s", str(SIZE // 2), file], ["truncate", "-s", str(SIZE), file]),
    ):
        run(spoil)
        refused = native.run("upgrade", "-n", str(device_id(path)), check=False)
        run(mend)
        assert refused.status == 1, str(refused)
        assert "disk.img" in refused.err, str(refused)
    # The backing file cannot be opened by its name any more.
    (scratch / "disk.img").rename(scratch / "moved.img")
    refused = native.run("upgrade", "-n", str(device_id(path)), check=False)
    assert refused.status == 1, str(refused)
    assert "disk.img" in refused.err, str(refused)
    assert native.info(path)["pid"] == pid
    with Disk(path, direct=True) as disk:
        disk.write(0, bytes(4096))
    native.run("del", "-n", str(device_id(path)))


def test_only_devices_that_were_made_for_it_are_recovered(native) -> None:
    path = native.add("-t", "mem", "--size", "1M")
    number = str(device_id(path))
    for words in (["recover", "-n", number], ["quiesce", "-n", number], ["upgrade", "-n", number]):
        refused = native.run(*words, check=False)
        assert refused.status == 1, str(refused)
        assert refused.err.startswith("ublk: "), str(refused)
    with Disk(path, direct=True) as disk:
        disk.write(0, bytes(512))
    native.run("del", "-n", number)


@pytest.mark.parametrize("kind", ["mem", "zoned"])
def test_a_disk_in_memory_cannot_be_recovered(kind: str, face: Face) -> None:
    """The next server would put an empty disk under a mounted file system."""
    refused = face.run("add", "-t", kind, "--size", "64M", "--recovery", check=False)
    assert refused.status == 1, str(refused)
    assert "memory" in refused.err, str(refused)
    assert "-t file" in refused.err, str(refused)
    assert face.list() == []


@pytest.mark.io_errors
def test_a_disk_in_memory_of_an_earlier_version_is_not_recovered(native: Face) -> None:
    """Earlier versions made such disks."""
    path = native.add("-t", "null", "--size", "1M", "--recovery")
    number = str(device_id(path))
    state = state_file(path)
    state.write_text(state.read_text().replace('"null"', '"mem"'))
    pid = native.info(path)["pid"]
    refused = native.run("upgrade", "-n", number, check=False)
    assert refused.status == 1, str(refused)
    assert "memory" in refused.err or not has("QUIESCE"), str(refused)
    assert native.info(path)["pid"] == pid
    kill_server(native, path)
    refused = native.run("recover", "-n", number, check=False, timeout=NOTICE + 15)
    assert refused.status == 1, str(refused)
    assert "memory" in refused.err, str(refused)
    native.run("del", "--force", "-n", number, timeout=NOTICE + 15)


def test_a_device_that_is_not_recoverable_is_said_to_be_that(native: Face) -> None:
    path = native.add("-t", "null")
    for command in ("quiesce", "upgrade"):
        refused = native.run(command, "-n", str(device_id(path)), check=False)
        assert refused.status == 1, str(refused)
        assert "created without recovery" in refused.err, str(refused)
        assert "not supported" not in refused.err, str(refused)
    native.run("del", "-n", str(device_id(path)))


@pytest.mark.long
@needs_quiesce
@pytest.mark.io_errors
@pytest.mark.time_limit(240)
def test_a_request_to_leave_that_was_late_is_said_to_be_pending(native: Face, scratch: Path) -> None:
    path = native.add("-t", "file", "-f", image(scratch, SIZE), "--recovery")
    number = str(device_id(path))
    pid = native.info(path)["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        # It waits for its server for a minute.
        refused = native.run("quiesce", "-n", number, check=False, timeout=100)
        assert refused.status == 1, str(refused)
        assert f"process {pid} is stopped" in refused.err, str(refused)
        assert "pending" in refused.err, str(refused)
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: not is_running(pid), "the server leaving", NOTICE)
    assert native.info(path)["state"] == "QUIESCED"
    native.run("recover", "-n", number, timeout=NOTICE)
    native.run("del", "-n", number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_leaves_a_mounted_recoverable_disk(number: int, native: Face, scratch: Path, tmp_path: Path) -> None:
    path = native.add("-t", "file", "-f", image(scratch, SIZE), "--recovery")
    run(["mkfs.ext4", "-q", path])
    run(["mount", path, tmp_path])
    try:
        (tmp_path / "file").write_text("kept")
        pid = native.info(path)["pid"]
        os.kill(pid, number)
        until(lambda: not is_running(pid), "the server's end", 30)
        until(lambda: native.info(path)["state"] == "QUIESCED", "the state QUIESCED", NOTICE)
        native.run("recover", "-n", str(device_id(path)), timeout=NOTICE + 15)
        run(["sync", "-f", tmp_path])
        assert (tmp_path / "file").read_text() == "kept"
    finally:
        run(["umount", tmp_path])
    run(["e2fsck", "-f", "-n", path])
    native.run("del", "-n", str(device_id(path)))


def test_a_signal_removes_a_recoverable_disk_that_is_not_used(native: Face, scratch: Path) -> None:
    path = native.add("-t", "file", "-f", image(scratch, SIZE), "--recovery")
    pid = native.info(path)["pid"]
    os.kill(pid, signal.SIGTERM)
    until(lambda: not is_running(pid), "the server's end", 30)
    assert native.list() == []
    assert not state_file(path).exists()


def test_a_served_device_is_not_recovered(native, scratch: Path) -> None:
    path = native.add("-t", "file", "-f", image(scratch, SIZE), "--recovery")
    pid = native.info(path)["pid"]
    refused = native.run("recover", "-n", str(device_id(path)), check=False)
    assert refused.status == 1, str(refused)
    assert str(pid) in refused.err or "another server uses this file" in refused.err, str(refused)
    assert native.info(path)["pid"] == pid
    native.run("del", "-n", str(device_id(path)))


@pytest.mark.io_errors
def test_a_recovery_that_nobody_can_be_told_of_leaves_the_device(native, scratch: Path) -> None:
    path = native.add("-t", "file", "-f", image(scratch, SIZE), "--recovery")
    number = str(device_id(path))
    with Disk(path, direct=True) as disk:
        disk.write(0, b"\x5a" * 4096)
    kill_server(native, path)
    # Its log cannot be written: the server goes again.
    refused = native.run("recover", "-n", number, "--log", "/nonexistent/log", check=False, timeout=NOTICE + 15)
    assert refused.status == 1, str(refused)
    assert "/nonexistent/log" in refused.err, str(refused)
    until(lambda: native.info(path)["state"] == "QUIESCED", "the state QUIESCED", NOTICE)
    assert state_file(path).exists()
    # Its path cannot be printed: that is no reason to end a disk which others use.
    full = run(["sh", "-c", f"exec ublk recover -n {number} > /dev/full"], check=False, timeout=NOTICE + 15)
    assert full.status == 1, str(full)
    assert native.info(path)["state"] == "LIVE"
    with Disk(path, direct=True) as disk:
        assert disk.read(0, 4096) == b"\x5a" * 4096
    native.run("del", "-n", number)


def test_a_device_keeps_its_log(native, scratch: Path, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    path = native.add("-t", "file", "-f", image(scratch, SIZE), "--recovery", "--log", log)
    pid = native.info(path)["pid"]
    os.kill(pid, signal.SIGKILL)
    # Not waiting for its end: that is for `recover` to do.
    native.run("recover", "-n", str(device_id(path)), timeout=NOTICE + 15)
    assert os.readlink(f"/proc/{native.info(path)['pid']}/fd/2") == str(log)
    native.run("del", "-n", str(device_id(path)))


@pytest.mark.io_errors
def test_del_dead_spares_a_device_that_waits_for_a_server(native, scratch: Path) -> None:
    path = native.add("-t", "file", "-f", image(scratch, SIZE), "--recovery")
    kill_server(native, path)
    until(lambda: native.info(path)["state"] == "QUIESCED", "the state QUIESCED", NOTICE)
    native.run("del", "--dead")
    assert native.info(path)["state"] == "QUIESCED"
    native.run("del", "--dead", "--force")
    assert native.list() == []
    assert not state_file(path).exists()


@pytest.mark.io_errors
def test_the_state_of_an_earlier_device_is_not_a_later_ones(native, scratch: Path) -> None:
    path = native.add("-t", "file", "-f", image(scratch, SIZE), "--recovery", "-n", "5")
    content = state_file(path).read_text()
    native.run("del", "-n", "5")
    path = native.add("-t", "null", "--size", "1M", "--recovery", "-n", "5")
    kill_server(native, path)
    state_file(path).write_text(content)
    refused = native.run("recover", "-n", "5", check=False, timeout=NOTICE + 15)
    assert refused.status == 1, str(refused)
    assert "ublkb5.json" in refused.err, str(refused)
    native.run("del", "--force", "-n", "5", timeout=NOTICE + 15)
