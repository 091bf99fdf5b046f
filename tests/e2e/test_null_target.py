# SPDX-License-Identifier: MIT OR Apache-2.0
"""The disk that takes everything and stores nothing."""

import pytest
from support import fio, sysfs
from support.blockio import Disk
from support.command import run


@pytest.mark.short
def test_it_has_a_size_by_default(native_disk) -> None:
    assert sysfs.size(native_disk("-t", "null")) == 250 << 30


def test_every_operation_succeeds_everywhere(native_disk) -> None:
    size = 1 << 40
    path = native_disk("-t", "null", "--size", "1T")
    with Disk(path, direct=True) as disk:
        for offset in (0, 512, size // 2 + 512, size - (1 << 20)):
            disk.write(offset, bytes(1 << 20))
            assert len(disk.read(offset, 1 << 20)) == 1 << 20
            disk.write_durably(offset, bytes(512))
            disk.punch(offset, 4096)
        assert len(disk.read(size - 512, 4096)) == 512
        disk.sync()
    run(["blkdiscard", path])
    run(["blkdiscard", "--zeroout", path])


def test_two_queues_take_parallel_load(native_disk) -> None:
    path = native_disk("-t", "null", "-q", "2", "--size", "1G")
    with fio.Load(path, seconds=2, numjobs=2, iodepth=64, bs="4k") as load:
        assert load.wait() == 0


def test_the_longest_request_can_be_set(native_disk, native) -> None:
    path = native_disk("-t", "null", "--size", "1G", "--max-io", "4M")
    assert native.info(path)["max_io_bytes"] == 4 << 20
    assert sysfs.number(path, "queue/max_hw_sectors_kb") == 4 << 10
    with Disk(path, direct=True) as disk:
        assert len(disk.read(512, 16 << 20)) == 16 << 20


def test_memory_that_other_requests_used_is_not_shown(native_disk) -> None:
    # Reads return what the buffers hold. That must not be data of another device or user.
    path = native_disk("-t", "null", "--size", "1G", "-d", "1")
    secret = b"\xa5" * 65536
    with Disk(path, direct=True) as disk:
        disk.write(0, secret)
        found = disk.read(0, 65536)
        assert found in (bytes(65536), secret), f"neither zeros nor what was written: {found[:32].hex()}"
