# SPDX-License-Identifier: MIT OR Apache-2.0
"""Zoned disks: write pointers, appends, limits, and a file system that lives on them."""

import errno
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import fio, sysfs
from support.blockio import Disk, error_of
from support.command import run
from support.face import Face, device_id
from support.features import has
from support.zones import keep_files, report

ZONE = 4 << 20

pytestmark = pytest.mark.skipif(not has("ZONED"), reason="zones came with Linux 6.6")


def add(native: Face, *words: str | os.PathLike, zones: int = 16) -> str:
    return native.add("-t", "zoned", "--size", str(zones * ZONE), "--zone-size", "4M", *words)


def remove(place: Path) -> None:
    """Removes a directory of zones."""
    for file in place.iterdir():
        file.unlink()
    place.rmdir()


@pytest.mark.short
def test_the_kernel_sees_the_zones(native: Face) -> None:
    path = add(native, "--conventional-zones", "2", "--max-open-zones", "4", "--max-active-zones", "6")
    assert sysfs.attribute(path, "queue/zoned") == "host-managed"
    assert sysfs.number(path, "queue/nr_zones") == 16
    assert sysfs.number(path, "queue/chunk_sectors") == ZONE // 512
    assert sysfs.number(path, "queue/max_open_zones") == 4
    assert sysfs.number(path, "queue/max_active_zones") == 6
    zones = report(path)
    assert len(zones) == 16
    assert [zone["type"] for zone in zones] == ["1"] * 2 + ["2"] * 14
    native.run("del", "-n", str(device_id(path)))


@pytest.mark.short
@pytest.mark.io_errors
def test_writes_belong_at_the_write_pointer(native: Face) -> None:
    path = add(native)
    with Disk(path, direct=True) as disk:
        disk.write(ZONE, b"a" * 4096)
        disk.write(ZONE + 4096, b"b" * 8192)
        assert disk.read(ZONE, 12288) == b"a" * 4096 + b"b" * 8192
        assert int(report(path)[1]["wptr"], 16) * 512 == 12288
        assert error_of(lambda: disk.write(2 * ZONE + 4096, bytes(4096))) == errno.EIO
        run(["blkzone", "reset", "-o", str(ZONE // 512), "-c", "1", path])
        disk.drop_cache()
        assert disk.read(ZONE, 4096) == bytes(4096)
        disk.write(ZONE, b"c" * 4096)
    native.run("del", "-n", str(device_id(path)))


def test_zones_are_opened_closed_and_finished(native: Face) -> None:
    path = add(native)
    offset = ["-o", str(2 * ZONE // 512), "-c", "1"]

    def condition() -> str:
        return report(path)[2]["name"]

    assert condition() == "em"
    run(["blkzone", "open", *offset, path])
    assert condition() == "oe"
    with Disk(path, direct=True) as disk:
        disk.write(2 * ZONE, bytes(4096))
    run(["blkzone", "close", *offset, path])
    assert condition() == "cl"
    run(["blkzone", "finish", *offset, path])
    assert condition() == "fu"
    run(["blkzone", "reset", path])
    assert {zone["name"] for zone in report(path)} == {"em"}
    native.run("del", "-n", str(device_id(path)))


@pytest.mark.io_errors
def test_zones_opened_by_command_are_limited(native: Face) -> None:
    path = add(native, "--max-open-zones", "2")
    for zone in (1, 2):
        run(["blkzone", "open", "-o", str(zone * ZONE // 512), "-c", "1", path])
    refused = run(["blkzone", "open", "-o", str(3 * ZONE // 512), "-c", "1", path], check=False)
    assert refused.status != 0, str(refused)
    with Disk(path, direct=True) as disk:
        assert error_of(lambda: disk.write(4 * ZONE, bytes(4096))) != 0
        disk.write(ZONE, bytes(4096))
    native.run("del", "-n", str(device_id(path)))


@pytest.mark.parametrize("kind", ["memory", "directory"])
def test_fio_writes_and_verifies_zones(kind: str, native: Face, scratch: Path) -> None:
    more = ["-f", scratch / "zones"] if kind == "directory" else []
    path = add(native, "-q", "2", "--max-open-zones", "4", *more)
    fio.verify(path, rw="write", zonemode="zbd", bs="64k", iodepth=8, size=f"{8 * ZONE}", max_open_zones=4)
    fio.measure(path, rw="randwrite", zonemode="zbd", bs="16k", iodepth=8, size=f"{8 * ZONE}", max_open_zones=4)
    native.run("del", "-n", str(device_id(path)))
    if kind == "directory":
        remove(scratch / "zones")


def test_zones_in_a_directory_outlive_their_server(native: Face, scratch: Path) -> None:
    place = scratch / "zones"
    path = add(native, "-f", place)
    with Disk(path, direct=True) as disk:
        disk.write(ZONE, b"z" * 8192)
        disk.sync()
    native.run("del", "-n", str(device_id(path)))
    path = add(native, "-f", place)
    assert int(report(path)[1]["wptr"], 16) * 512 == 8192
    assert report(path)[1]["name"] == "cl"
    with Disk(path, direct=True) as disk:
        assert disk.read(ZONE, 8192) == b"z" * 8192
        disk.write(ZONE + 8192, b"y" * 4096)
    native.run("del", "-n", str(device_id(path)))
    remove(place)


@pytest.mark.time_limit(180)
def test_writers_do_not_notice_that_servers_are_killed(native: Face, scratch: Path) -> None:
    place, length = scratch / "zones", 256 << 10
    path = add(native, "-f", place, "-q", "2", "--recovery", "reissue", zones=8)
    number = str(device_id(path))
    stop = threading.Event()
    counts = [0, 0]

    def write(zone: int) -> None:
        start = zone * ZONE
        with Disk(path, direct=True) as disk:
            while not stop.is_set():
                # By force: otherwise it opens the disk for itself alone, and the other writer may be at it, too.
                run(["blkzone", "reset", "--force", "-o", str(start // 512), "-c", "1", path])
                for at in range(0, ZONE, length):
                    disk.write(start + at, os.urandom(length))
                    counts[zone] += 1
                    if stop.is_set():
                        break

    with ThreadPoolExecutor() as pool:
        writers = [pool.submit(write, zone) for zone in range(len(counts))]
        try:
            for _ in range(8):
                before = counts[:]
                while not all(now >= then + 2 for now, then in zip(counts, before, strict=True)):
                    for writer in writers:
                        if writer.done():
                            writer.result()
                    time.sleep(0.001)
                os.kill(native.info(path)["pid"], signal.SIGKILL)
                native.run("recover", "-n", number, timeout=60)
        finally:
            stop.set()
        for writer in writers:
            writer.result()
    native.run("del", "-n", number)
    remove(place)


@pytest.mark.io_errors
def test_a_full_file_system_moves_no_write_pointer(native: Face, scratch: Path, tmp_path: Path) -> None:
    length = 512 << 10
    run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", tmp_path])
    try:
        path = add(native, "-f", tmp_path / "zones", "--recovery", zones=4)
        number = str(device_id(path))
        with Disk(path, direct=True) as disk:
            acknowledged = 0

            def fill() -> None:
                nonlocal acknowledged
                for at in range(0, 2 * ZONE, length):
                    disk.write(at, b"a" * length)
                    acknowledged = at + length

            assert error_of(fill) == errno.ENOSPC
            assert acknowledged > ZONE
            pointers = [int(zone["wptr"], 16) * 512 for zone in report(path)]
            # Counted from the zone's start.
            assert ZONE + pointers[1] == acknowledged
            os.kill(native.info(path)["pid"], signal.SIGKILL)
            native.run("recover", "-n", number, timeout=60)
            assert [int(zone["wptr"], 16) * 512 for zone in report(path)] == pointers
            run(["mount", "-o", "remount,size=16m", tmp_path])
            disk.write(acknowledged, b"b" * length)
            assert disk.read(acknowledged - length, 2 * length) == b"a" * length + b"b" * length
        native.run("del", "-n", number)
    finally:
        run(["umount", tmp_path])


@pytest.mark.time_limit(180)
def test_a_file_system_lives_on_zones(native: Face, tmp_path: Path) -> None:
    path = native.add("-t", "zoned", "--size", "1G", "--zone-size", "16M", "-q", "2")
    keep_files(path, tmp_path)
    native.run("del", "-n", str(device_id(path)))


def test_impossible_zones_are_named(native: Face) -> None:
    for words, message in (
        (["--zone-size", "3M"], "zone size"),
        (["--size", "6M", "--zone-size", "4M"], "zone size"),
        (["--size", "16M", "--zone-size", "4M", "--conventional-zones", "4"], "conventional"),
        (["--size", "16M", "--zone-size", "4M", "--max-open-zones", "9"], "open zones"),
        (["--data", "copy"], "user-copy"),
    ):
        refused = native.run("add", "-t", "zoned", *words, check=False)
        assert refused.status == 1, str(refused)
        assert message in refused.err, str(refused)
    assert native.list() == []
