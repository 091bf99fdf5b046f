# SPDX-License-Identifier: MIT OR Apache-2.0
"""The disk's properties in sysfs: what the target can do and what was asked for, and nothing else."""

import errno

import pytest
from support import sysfs
from support.backends import added, image
from support.blockio import Disk, error_of
from support.command import run
from support.server import Server

pytestmark = pytest.mark.long

SHORT = pytest.mark.short


def operations(*names: str) -> dict[str, bool]:
    return {name: name in names for name in ("write", "flush", "fua", "discard", "write_zeroes")}


def test_null_can_do_everything(native_disk) -> None:
    path = native_disk("-t", "null")
    assert sysfs.advertised(path) == operations("write", "flush", "fua", "discard", "write_zeroes")


def test_mem_has_no_cache_to_flush(native_disk) -> None:
    path = native_disk("-t", "mem", "--size", "1M")
    assert sysfs.advertised(path) == operations("write", "discard", "write_zeroes")


def test_file_can_do_everything(scratch) -> None:
    with added("-t", "file", "-f", str(image(scratch))) as path:
        assert sysfs.advertised(path) == operations("write", "flush", "fua", "discard", "write_zeroes")


def test_a_device_below_without_discard_is_not_discarded() -> None:
    with Server("ReadWrite") as below, added("-t", "file", "-f", below.path) as path:
        assert sysfs.advertised(path)["discard"] is False
        assert run(["blkdiscard", path], check=False).status != 0


@pytest.mark.parametrize("kind", ["null", "mem"])
def test_a_read_only_disk_changes_nothing(kind: str, native_disk) -> None:
    path = native_disk("-t", kind, "--read-only", "--size", "1M")
    assert sysfs.attribute(path, "ro") == "1"
    refused = run(["blkdiscard", path], check=False)
    assert refused.status != 0
    with Disk(path, direct=True, read_only=True) as disk:
        assert len(disk.read(0, 4096)) == 4096


def test_sizes_are_as_asked(native_disk, native) -> None:
    path = native_disk(
        *("-t", "mem", "--size", "3M", "--block-size", "1024", "--physical-block-size", "4096"),
        *("--max-io", "128K", "-d", "7", "--rotational"),
    )
    assert sysfs.size(path) == 3 << 20
    assert sysfs.number(path, "queue/logical_block_size") == 1024
    assert sysfs.number(path, "queue/physical_block_size") == 4096
    assert sysfs.number(path, "queue/max_hw_sectors_kb") == 128
    assert sysfs.number(path, "queue/rotational") == 1
    assert sysfs.number(path, "mq/0/nr_tags") == 7
    info = native.info(path)
    expected = {"size": 3 << 20, "block_size": 1024, "depth": 7, "queues": 1, "max_io_bytes": 128 << 10}
    assert {key: info[key] for key in expected} == expected
    assert info["read_only"] is False


def test_direct_io_below_the_block_size_is_refused(native_disk) -> None:
    path = native_disk("-t", "mem", "--size", "1M", "--block-size", "4096")
    with Disk(path, direct=True) as disk:
        assert error_of(lambda: disk.read(512, 512)) == errno.EINVAL
        assert len(disk.read(4096, 4096)) == 4096


@pytest.mark.parametrize(
    ("disk", "can"),
    [
        pytest.param("ReadOnly", operations(), marks=SHORT),
        ("ReadWrite", operations("write")),
        ("WithFlush", operations("write", "flush")),
        ("InheritedWrite", operations("write", "flush")),
        ("WithDiscard", operations("write", "discard")),
        ("WithWriteZeroes", operations("write", "write_zeroes")),
    ],
)
def test_python_advertises_what_the_class_overrides(disk: str, can: dict[str, bool]) -> None:
    with Server(disk) as server:
        found = sysfs.advertised(server.path)
        # FUA is the library's choice wherever there is a flush.
        assert found | {"fua": False} == can
        assert can["flush"] or not found["fua"]


def test_a_python_disk_has_the_shape_that_its_class_gives(native) -> None:
    with Server(
        "Ram",
        size=3 << 20,
        block_size=1024,
        physical_block_size=4096,
        max_io_bytes=128 << 10,
        rotational=True,
        depth=7,
    ) as server:
        path = server.path
        assert sysfs.size(path) == 3 << 20
        assert sysfs.number(path, "queue/logical_block_size") == 1024
        assert sysfs.number(path, "queue/physical_block_size") == 4096
        assert sysfs.number(path, "queue/max_hw_sectors_kb") == 128
        assert sysfs.number(path, "queue/rotational") == 1
        assert sysfs.number(path, "mq/0/nr_tags") == 7
        assert server.ask("[dev.size, dev.block_size, dev.depth, dev.queues, dev.running]") == [
            3 << 20,
            1024,
            7,
            1,
            True,
        ]
        assert server.ask("dev.path") == path
        assert server.ask("dev.id") == server.id
        info = native.info(path)
        expected = {"size": 3 << 20, "block_size": 1024, "depth": 7, "state": "LIVE", "pid": server.pid}
        assert {key: info[key] for key in expected} == expected


def test_a_python_disk_without_write_refuses_writes() -> None:
    with Server("ReadOnly") as server:
        with Disk(server.path, direct=True, read_only=True) as disk:
            assert len(disk.read(0, 65536)) == 65536
        written = run(["dd", "if=/dev/zero", f"of={server.path}", "bs=4096", "count=1", "oflag=direct"], check=False)
        assert written.status != 0
        assert run(["blkdiscard", server.path], check=False).status != 0


def test_what_python_does_not_override_is_done_without_it() -> None:
    with Server("ReadWrite", size=1 << 20) as server, Disk(server.path, direct=True) as disk:
        disk.write(0, b"\x99" * (1 << 20))
        # The kernel writes the zeros itself.
        run(["blkdiscard", "--zeroout", "--offset", "4096", "--length", "8192", server.path])
        assert disk.read(0, 16384) == b"\x99" * 4096 + bytes(8192) + b"\x99" * 4096
        disk.sync()
        assert run(["blkdiscard", server.path], check=False).status != 0
        assert error_of(lambda: disk.punch(0, 4096)) == errno.EOPNOTSUPP
