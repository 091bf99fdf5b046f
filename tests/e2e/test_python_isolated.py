# SPDX-License-Identifier: MIT OR Apache-2.0
"""Python devices that a process of their own serves."""

import os
import signal
from pathlib import Path

import pytest
from support import fio, sysfs
from support.backends import image
from support.blockio import SECTOR, Disk
from support.command import run
from support.face import Face
from support.features import has
from support.server import Server
from support.waiting import until

TROUBLE = 1000 * SECTOR


def read_fails(path: str, offset: int) -> None:
    with Disk(path, direct=True) as disk, pytest.raises(OSError, match="Input/output error"):
        disk.read(offset, SECTOR)


@pytest.mark.parametrize(("kind", "workers"), [("Ram", None), ("Ram", 4), ("TaskRam", None)], ids=str)
def test_data_is_right_whatever_the_program_does(kind: str, workers: int | None) -> None:
    with Server(kind, isolated=True, queues=2, workers=workers) as server:
        server.ask("compute_beside()")
        assert server.ask("dev.info.pid") != server.pid
        fio.verify(server.path, size="4m", bs="16k", iodepth=16)
        assert server.ask("dev.stats().requests") > 512
        # The object here is another.
        assert server.ask("not any(disk.data)") is True


def test_a_mapped_disk_has_its_file_there(scratch: Path) -> None:
    file = image(scratch, 8 << 20)
    with Server("Whole", isolated=True, path=str(file)) as server:
        fio.verify(server.path, size="4m", bs="16k", iodepth=16)
        assert server.ask("dev.stats().entries") < server.ask("dev.stats().requests")


@pytest.mark.io_errors
def test_a_mistake_of_a_handler_is_in_the_programs_log() -> None:
    with Server("FailsAt", isolated=True, how="KeyError('a mistake')") as server:
        read_fails(server.path, TROUBLE)
        until(lambda: "ERROR:ublk:FailsAt.read failed" in server.log, "a message in the log")
        assert "KeyError: 'a mistake'" in server.log
        assert server.ask("dev.running") is True


@pytest.mark.io_errors
def test_a_handlers_exit_ends_the_wait_of_the_program() -> None:
    with Server("FailsAt", isolated=True, how="SystemExit(7)") as server:
        read_fails(server.path, TROUBLE)
        assert server.ask("caught(lambda: dev.wait(30))") == "SystemExit"
        until(lambda: not os.path.exists(server.path), "the device to go")


@pytest.mark.short
def test_a_process_that_is_killed_takes_its_device_with_it_and_the_program_is_told(native: Face) -> None:
    with Server("Ram", isolated=True) as server:
        os.kill(server.ask("dev.info.pid"), signal.SIGKILL)
        assert server.ask("caught(lambda: dev.wait(30))") == "UblkError"
        until(lambda: native.list() == [], "the device to go")
        assert server.ask("dev.running") is False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_program_that_is_killed_takes_its_devices_with_it(number: int, native: Face) -> None:
    with Server("Ram", isolated=True) as server, Disk(server.path, direct=True) as disk:
        disk.read(0, 4096)
        server.kill(number)
        until(lambda: native.list() == [], "the device to go")


def test_a_device_that_somebody_else_deletes_is_told_to_the_program(native: Face) -> None:
    with Server("Ram", isolated=True) as server:
        native.run("del", "-n", str(server.id))
        assert server.ask("dev.wait(30)") is True


@pytest.mark.long
@pytest.mark.io_errors
@pytest.mark.time_limit(120)
@pytest.mark.parametrize("who", ["program", "process"])
def test_a_recoverable_disk_outlives_both(who: str, native: Face, scratch: Path) -> None:
    file = image(scratch, 16 << 20)
    options = {"path": str(file), "isolated": True}
    with Server("OnFile", recoverable=True, **options) as server:
        path, number = server.path, server.id
        server.expect_end()
        with fio.Load(path, size="8m", rw="randwrite", numjobs=1) as load:
            load.wait_until_busy(sysfs.requests(path) + 100)
            os.kill(server.pid if who == "program" else server.ask("dev.info.pid"), signal.SIGKILL)
            if who == "program":
                server.wait()
            else:
                assert server.ask("caught(lambda: dev.wait(30))") == "UblkError"
                server.ask("dev.stop()")
                assert f"ublk.recover({number}, ...)" in server.log
            with Server("OnFile", recover=number, **options) as second:
                assert second.path == path
                load.wait_until_busy(sysfs.requests(path) + 100)
                assert load.process.poll() is None
                load.__exit__()
    assert native.list() == []


@pytest.mark.long
@pytest.mark.skipif(not has("QUIESCE"), reason="QUIESCE_DEV came with Linux 6.16")
def test_a_disk_is_left_and_resized_from_the_program(native: Face, scratch: Path) -> None:
    file = image(scratch, 16 << 20)
    options = {"path": str(file), "isolated": True}
    with Server("OnFile", recoverable=True, **options) as server:
        path, number = server.path, server.id
        server.ask("dev.resize(8 << 20)")
        assert sysfs.size(path) == server.ask("dev.size") == 8 << 20
        server.ask("dev.quiesce()")
        assert native.info(path)["pid"] is None
        with Server("OnFile", recover=number, **options) as second:
            run(["dd", f"if={second.path}", "of=/dev/null", "bs=1M", "count=4", "iflag=direct"])
    assert native.list() == []
