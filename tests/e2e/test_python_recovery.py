# SPDX-License-Identifier: MIT OR Apache-2.0
"""Python devices that outlive their programs, and what programs can do with devices of others."""

import os
import signal
from pathlib import Path

import pytest
from support import fio, sysfs
from support.backends import image
from support.blockio import Disk
from support.command import run
from support.face import Face
from support.features import has
from support.server import Server, ServerFailed

# How often a disk changes its server in one test; more by hand.
ROUNDS = int(os.environ.get("UBLK_ROUNDS", "3"))
SIZE = 64 << 20

needs_quiesce = pytest.mark.skipif(not has("QUIESCE"), reason="QUIESCE_DEV came with Linux 6.16")


def serve(file: Path, **options) -> Server:
    return Server("OnFile", path=str(file), **options)


@pytest.mark.short
@pytest.mark.io_errors
@pytest.mark.time_limit(120 + ROUNDS * 60)
def test_a_killed_program_is_followed_by_another_and_no_request_fails(native: Face, scratch: Path) -> None:
    file = image(scratch, SIZE)
    with serve(file, queues=2, recoverable=True) as server:
        path, number = server.path, server.id
        server.expect_end()
        fio.verify(path, size="8m", bs="4k", iodepth=16)
        with fio.Load(path, 60 + ROUNDS * 60, offset="32m", size="16m", rw="randwrite", numjobs=1) as load:
            for _ in range(ROUNDS):
                load.wait_until_busy(sysfs.requests(path) + 100)
                server.kill(signal.SIGKILL)
                server.close()
                server = serve(file, recover=number, workers=2)
                assert server.path == path
            load.wait_until_busy(sysfs.requests(path) + 100)
            assert load.process.poll() is None
        fio.verify(path, size="8m", bs="4k", iodepth=16, verify_only=1)
        server.stop()
        server.close()
    assert native.list() == []


@pytest.mark.long
@needs_quiesce
@pytest.mark.time_limit(120 + ROUNDS * 30)
def test_a_mounted_busy_disk_goes_from_program_to_program(native: Face, scratch: Path, tmp_path: Path) -> None:
    file = image(scratch, SIZE)
    server = serve(file, queues=2, recoverable=True)
    try:
        path, number = server.path, server.id
        run(["mkfs.ext4", "-q", path])
        run(["mount", path, tmp_path])
        try:
            with fio.Steady(path, tmp_path, blocks=4096, seconds=10 + ROUNDS * 8) as load:
                for turn in range(ROUNDS):
                    load.wait_until_busy(sysfs.requests(path) + 20)
                    if turn % 2:
                        server.ask("dev.quiesce()")
                    else:
                        # By another process; the program then leaves the disk by itself.
                        server.ask(f"ublk.SystemDevice({number}).quiesce()")
                    server.stop()
                    server.close()
                    server = serve(file, recover=number)
                assert load.wait(120 + ROUNDS * 12) == 0
        finally:
            run(["umount", tmp_path])
        run(["e2fsck", "-f", "-n", path])
        server.stop()
    finally:
        server.close()
    assert native.list() == []


def test_a_served_device_is_not_recovered(scratch: Path) -> None:
    file = image(scratch, SIZE)
    with serve(file, recoverable=True) as server:
        with pytest.raises(ServerFailed, match=f"process {server.pid} serves"):
            serve(file, recover=server.id)
        with Disk(server.path, direct=True) as disk:
            disk.read(0, 4096)


@pytest.mark.skipif(not has("UPDATE_SIZE"), reason="UPDATE_SIZE came with Linux 6.16")
def test_a_disk_grows_while_it_is_in_use(scratch: Path) -> None:
    with Server("Ram", size=8 << 20) as server, Disk(server.path, direct=True) as disk:
        server.ask("disk.data.extend(bytes(8 << 20))")
        server.ask("dev.resize(16 << 20)")
        assert sysfs.size(server.path) == server.ask("dev.size") == 16 << 20
        disk.write(12 << 20, b"\x5a" * 4096)
        assert disk.read(12 << 20, 4096) == b"\x5a" * 4096
        server.ask(f"ublk.SystemDevice({server.id}).resize(4 << 20)")
        assert sysfs.size(server.path) == server.ask("dev.info.size") == 4 << 20


def test_a_programs_statistics_tell_of_its_requests() -> None:
    with Server("Ram", depth=64) as server:
        before = server.ask("dev.stats().requests")
        fio.verify(server.path, bs="4k", iodepth=64, size=4 << 20)
        assert server.ask("dev.stats().requests") - before >= 2048
        read = server.ask("vars_of(dev.stats().operations['read'])")
        assert read["errors"] == 0
        assert 0 < read["p50"] <= read["p99"] <= read["max"]


@pytest.mark.skipif(not has("SAFE_STOP_DEV"), reason="TRY_STOP_DEV came with Linux 7.0")
def test_a_device_of_somebody_else_is_deleted_unless_in_use(native: Face) -> None:
    with Server("Ram") as server:
        path = native.add("-t", "mem", "--size", "1M")
        number = native.info(path)["id"]
        with Disk(path, direct=True):
            assert server.ask(f"caught(ublk.SystemDevice({number}).delete)") == "UblkError"
        server.ask(f"ublk.SystemDevice({number}).delete()")
        assert not os.path.exists(path)
        assert server.ask(f"caught(lambda: ublk.SystemDevice({number}))") == "UblkError"
