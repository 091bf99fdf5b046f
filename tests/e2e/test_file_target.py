# SPDX-License-Identifier: MIT OR Apache-2.0
"""The disk in a file or on another block device."""

import errno
import fcntl
import hashlib
import os
import random
from pathlib import Path

import pytest
from support import sysfs
from support.backends import added, image, loop_device
from support.blockio import Disk, cached_bytes, error_of
from support.command import run
from support.face import device_id
from support.model import Model, compare, exercise
from support.server import Server

SIZE = 4 << 20


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_the_file_holds_what_was_written_to_the_disk(io: str, scratch: Path) -> None:
    file = image(scratch, SIZE)
    model = Model(SIZE)
    with added("-t", "file", "-f", str(file), "--io", io) as path, Disk(path, direct=True) as disk:
        exercise(disk, model, unit=512, longest=256 << 10, steps=100, seed=20, zeroing=True)
    compare(file.read_bytes(), bytes(model.data))


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_the_disk_shows_what_the_file_held(io: str, scratch: Path) -> None:
    file = scratch / "disk.img"
    content = random.Random(21).randbytes(SIZE)
    file.write_bytes(content)
    with added("-t", "file", "-f", str(file), "--io", io) as path, Disk(path, direct=True) as disk:
        compare(disk.read(0, SIZE), content)
    compare(file.read_bytes(), content)


def test_the_file_keeps_its_size(scratch: Path) -> None:
    # Not a multiple of a page, nor of anything else but a sector.
    size = SIZE + 3 * 512
    file = image(scratch, size)
    with added("-t", "file", "-f", str(file), "--io", "buffered") as path:
        assert sysfs.size(path) == size
        with Disk(path, direct=True) as disk:
            disk.write(size - 512, b"\x5a" * 512)
            disk.punch(size - 1024, 512)
            disk.zero_range(0, 512)
        run(["blkdiscard", path])
    assert file.stat().st_size == size


def test_discarding_makes_holes_in_the_file(scratch: Path) -> None:
    file = scratch / "disk.img"
    file.write_bytes(b"\x77" * SIZE)
    with added("-t", "file", "-f", str(file)) as path:
        os.sync()
        before = file.stat().st_blocks * 512
        run(["blkdiscard", "--offset", "0", "--length", str(SIZE // 2), path])
    assert before >= SIZE
    assert file.stat().st_blocks * 512 <= before - SIZE // 2
    assert file.read_bytes() == bytes(SIZE // 2) + b"\x77" * (SIZE // 2)


def test_direct_io_does_not_fill_the_page_cache_of_the_file(scratch: Path) -> None:
    file = image(scratch, SIZE)
    for io, fills in (("direct", False), ("buffered", True)):
        with added("-t", "file", "-f", str(file), "--io", io) as path, Disk(path, direct=True) as disk:
            disk.write(0, b"\x11" * SIZE)
            disk.read(0, SIZE)
        cached = cached_bytes(file)
        assert (cached >= SIZE) == fills, f"{cached} bytes of the file are cached with --io {io}"


def test_a_part_of_the_file_can_be_served(scratch: Path) -> None:
    file = scratch / "disk.img"
    file.write_bytes(b"\x33" * SIZE)
    with added("-t", "file", "-f", str(file), "--size", "1M") as path:
        assert sysfs.size(path) == 1 << 20
        with Disk(path, direct=True) as disk:
            disk.write(0, bytes(1 << 20))
    assert file.read_bytes() == bytes(1 << 20) + b"\x33" * (SIZE - (1 << 20))


def _write_error(path: str) -> int:
    def write() -> None:
        with Disk(path, direct=True) as disk:
            disk.write(0, bytes(512))

    return error_of(write)


def test_read_only(scratch: Path) -> None:
    file = scratch / "disk.img"
    content = random.Random(22).randbytes(SIZE)
    file.write_bytes(content)
    with added("-t", "file", "-f", str(file), "--read-only") as path:
        assert sysfs.attribute(path, "ro") == "1"
        assert _write_error(path) in (errno.EACCES, errno.EPERM, errno.EROFS)
        with Disk(path, direct=True, read_only=True) as disk:
            compare(disk.read(0, SIZE), content)
    assert file.read_bytes() == content


def test_a_read_only_file_is_served_read_only_by_root_s_wish_only(scratch: Path) -> None:
    # Two readers may share a file, a writer is alone.
    file = image(scratch, SIZE)
    words = ("-t", "file", "-f", str(file), "--read-only")
    with added(*words) as first, added(*words) as second:
        assert first != second


def test_block_size_of_a_block_device_below_is_kept(scratch: Path) -> None:
    file = image(scratch, SIZE)
    with loop_device(file, block_size=4096) as below, added("-t", "file", "-f", below) as path:
        assert sysfs.number(path, "queue/logical_block_size") == 4096
        model = Model(SIZE)
        with Disk(path, direct=True) as disk:
            exercise(disk, model, unit=4096, longest=128 << 10, steps=60, seed=23)
    compare(file.read_bytes(), bytes(model.data))


def test_a_device_of_ours_can_stand_on_another(native_disk) -> None:
    below = native_disk("-t", "mem", "--size", "4M")
    above = native_disk("-t", "file", "-f", below)
    content = random.Random(24).randbytes(SIZE)
    with Disk(above, direct=True) as disk:
        disk.write(0, content)
    native_disk.remove_one(above)
    with Disk(below, direct=True) as disk:
        compare(disk.read(0, SIZE), content)


def test_flush_fua_discard_and_zeroing_reach_the_device_below() -> None:
    with Server("Ram", size=SIZE) as server, added("-t", "file", "-f", server.path) as path:

        def seen(*names: str) -> list[list]:
            return server.ask(f"disk.logged(*{names!r})")

        assert sysfs.advertised(path) == dict.fromkeys(("write", "flush", "fua", "discard", "write_zeroes"), True)
        with Disk(path, direct=True) as disk:
            server.ask("disk.forget()")
            disk.write(0, b"\x42" * 4096)
            assert [entry[0] for entry in seen("write", "flush")] == ["write"], "a plain write is not flushed"
            disk.sync()
            assert [entry[0] for entry in seen("write", "flush")] == ["write", "flush"]

            server.ask("disk.forget()")
            disk.write_durably(8192, b"\x43" * 4096)
            # The device below has no FUA: its kernel side makes flushes of it, behind the write.
            first, *rest = seen("write", "flush")
            assert first == ["write", 8192, 4096]
            assert rest
            assert all(entry == ["flush", 0, 0] for entry in rest)

            server.ask("disk.forget()")
            disk.punch(65536, 32768)
            assert sum(length for _, _, length in seen("discard", "write_zeroes")) == 32768
            assert seen("write") == [], "zeroes were sent as data"

            server.ask("disk.forget()")
            run(["blkdiscard", "--offset", str(1 << 20), "--length", str(1 << 20), path])
            # A hole in a block device is zeroes to the block layer, which may be more than was asked for.
            assert sum(length for _, _, length in seen("discard", "write_zeroes")) == 1 << 20
            assert seen("write") == [], "zeroes were sent as data"


def test_a_device_below_that_cannot_zero_cannot_discard(native_disk) -> None:
    # Holes in block devices are made by write-zeroes.
    below = native_disk("-t", "mem", "--size", "4M", "--max-write-zeroes", "0")
    assert sysfs.advertised(below)["discard"]
    above = native_disk("-t", "file", "-f", below)
    assert not sysfs.advertised(above)["discard"]
    with Disk(above, direct=True) as disk:
        disk.write(0, b"\x42" * 8192)
        disk.zero_range(0, 4096)
        assert disk.read(0, 8192) == bytes(4096) + b"\x42" * 4096


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_without_a_write_cache_each_change_is_durable(io: str) -> None:
    words = ("--io", io, "--write-cache", "off")
    with Server("Ram", size=SIZE) as server, added("-t", "file", "-f", server.path, *words) as path:
        assert not sysfs.advertised(path)["flush"]
        with Disk(path, direct=True) as disk:
            changes = {
                "write": lambda: disk.write(0, b"\x42" * 4096),
                "hole": lambda: disk.punch(65536, 32768),
                "zeros": lambda: disk.zero_range(131072, 32768),
                "discard": lambda: disk.discard(1 << 20, 1 << 20),
            }
            for name, change in changes.items():
                server.ask("disk.forget()")
                change()
                assert server.ask("disk.log[-1][0]") == "flush", name


@pytest.mark.io_errors
def test_no_flush_of_any_queue_succeeds_after_writes_were_lost() -> None:
    def sync_errors() -> list[int]:
        errors = []
        for cpu in sorted(everywhere):
            os.sched_setaffinity(0, {cpu})
            errors.append(error_of(disk.sync))
        os.sched_setaffinity(0, everywhere)
        return errors

    everywhere = os.sched_getaffinity(0)
    with Server("Failing", size=SIZE) as server:
        words = ("-t", "file", "-f", server.path, "--io", "buffered", "-q", str(len(everywhere)))
        with added(*words) as path, Disk(path, direct=True) as disk:
            disk.write(0, b"\x01" * 4096)
            assert sync_errors() == [0] * len(everywhere)
            server.ask("disk.fail('write', 'OSError(5, \"the store below is gone\")')")
            disk.write(4096, b"\x02" * 4096)
            assert sync_errors() == [errno.EIO] * len(everywhere)
            # The store is back, and the page cache counts the lost pages as written.
            server.ask("disk.fail('', 'None')")
            disk.write(8192, b"\x03" * 4096)
            assert sync_errors() == [errno.EIO] * len(everywhere)
            assert disk.read(8192, 4096) == b"\x03" * 4096
        # A new server starts afresh.
        with added(*words) as path, Disk(path, direct=True) as disk:
            disk.write(4096, b"\x04" * 4096)
            assert sync_errors() == [0] * len(everywhere)


def test_a_deleted_file_is_served_on(scratch: Path) -> None:
    file = image(scratch, SIZE)
    with added("-t", "file", "-f", str(file)) as path:
        file.unlink()
        content = random.Random(25).randbytes(SIZE)
        with Disk(path, direct=True) as disk:
            disk.write(0, content)
            assert hashlib.sha256(disk.read(0, SIZE)).digest() == hashlib.sha256(content).digest()


@pytest.mark.io_errors
def test_reading_behind_the_end_of_a_file_that_shrank_is_an_error(scratch: Path) -> None:
    file = image(scratch, SIZE)
    with added("-t", "file", "-f", str(file)) as path, Disk(path, direct=True) as disk:
        os.truncate(file, SIZE // 2)
        assert error_of(lambda: disk.read(SIZE - 4096, 4096)) != 0
        assert len(disk.read(0, 4096)) == 4096, "the disk does not live on"


def test_the_file_is_locked_while_it_is_served(scratch: Path, native) -> None:
    file = image(scratch, SIZE)
    with added("-t", "file", "-f", str(file)) as path:
        result = native.run("add", "-t", "file", "-f", file, check=False)
        assert result.status == 1, str(result)
        assert str(file) in result.err, str(result)
        assert [device["id"] for device in native.list()] == [device_id(path)]
    with file.open("r+b") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
