# SPDX-License-Identifier: MIT OR Apache-2.0
"""Disks change their size while they are in use."""

import os
from pathlib import Path

import pytest
from support import fio, sysfs
from support.backends import image
from support.blockio import Disk
from support.command import run
from support.face import device_id
from support.features import has
from support.waiting import until

pytestmark = pytest.mark.skipif(not has("UPDATE_SIZE"), reason="UPDATE_SIZE came with Linux 6.16")


@pytest.mark.short
def test_a_busy_disk_grows_and_shrinks_with_its_file(native, scratch: Path) -> None:
    file = image(scratch, 32 << 20)
    path = native.add("-t", "file", "-f", file, "-q", "2", "--recovery")
    number = str(device_id(path))
    with fio.Load(path, size="16m", rw="randwrite") as load:
        load.wait_until_busy()
        os.truncate(file, 64 << 20)
        native.run("resize", "-n", number)
        assert sysfs.size(path) == 64 << 20
        with Disk(path, direct=True) as disk:
            disk.write((64 << 20) - 4096, b"\x5a" * 4096)
        native.run("resize", "-n", number, "-s", "24M")
        assert sysfs.size(path) == 24 << 20
        load.wait_until_busy(sysfs.requests(path) + 100)
    fio.verify(path, size="8m", bs="4k", iodepth=16)
    # The size outlives the server.
    native.run("upgrade", "-n", number)
    assert sysfs.size(path) == 24 << 20
    assert native.info(path)["size"] == 24 << 20
    native.run("del", "-n", number)
    assert file.read_bytes()[-4096:] == b"\x5a" * 4096


def test_a_mounted_file_system_uses_the_new_room(native, scratch: Path, tmp_path: Path) -> None:
    file = image(scratch, 32 << 20)
    path = native.add("-t", "file", "-f", file)
    run(["mkfs.ext4", "-q", path])
    run(["mount", path, tmp_path])
    try:
        before = os.statvfs(tmp_path).f_blocks
        os.truncate(file, 96 << 20)
        native.run("resize", "-n", str(device_id(path)))
        until(lambda: sysfs.size(path) == 96 << 20, "the new size")
        run(["resize2fs", path], timeout=60)
        assert os.statvfs(tmp_path).f_blocks > 2 * before
    finally:
        run(["umount", tmp_path])
    native.run("del", "-n", str(device_id(path)))


def test_sizes_that_cannot_be_are_refused(native, scratch: Path) -> None:
    path = native.add("-t", "file", "-f", image(scratch, 32 << 20))
    number = str(device_id(path))
    for size, words in (("64M", "exceeds the backing store"), ("1000", "multiple"), ("0", "multiple")):
        refused = native.run("resize", "-n", number, "-s", size, check=False)
        assert refused.status == 1, str(refused)
        assert words in refused.err, str(refused)
    assert sysfs.size(path) == 32 << 20
    native.run("del", "-n", number)


def test_a_file_that_took_the_name_of_the_backing_file_counts_for_nothing(native, scratch: Path) -> None:
    file = image(scratch, 32 << 20)
    path = native.add("-t", "file", "-f", file)
    number = str(device_id(path))
    file.rename(scratch / "moved.img")
    image(scratch, 64 << 20)
    for words in ([], ["-s", "64M"]):
        refused = native.run("resize", "-n", number, *words, check=False)
        assert refused.status == 1, str(refused)
        assert "the file has been replaced" in refused.err, str(refused)
    assert sysfs.size(path) == 32 << 20
    native.run("del", "-n", number)


def test_a_ram_disk_does_not_grow_beyond_what_it_was_made_with(native) -> None:
    path = native.add("-t", "mem", "--size", "32M")
    number = str(device_id(path))
    refused = native.run("resize", "-n", number, "-s", "64M", check=False)
    assert refused.status == 1, str(refused)
    assert "33554432" in refused.err, str(refused)
    native.run("resize", "-n", number, "-s", "16M")
    assert sysfs.size(path) == 16 << 20
    native.run("resize", "-n", number, "-s", "32M")
    with Disk(path, direct=True) as disk:
        disk.write((32 << 20) - 4096, bytes(4096))
    native.run("del", "-n", number)
