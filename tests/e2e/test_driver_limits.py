# SPDX-License-Identifier: MIT OR Apache-2.0
"""Parameters with which the block layer would crash, loop or lose data on some kernel."""

import contextlib
import errno
import fcntl
import json
import mmap
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import driver, raw, sysfs
from support.backends import image
from support.blockio import Disk, error_of
from support.command import run
from support.face import Face, device_id
from support.features import has
from support.kernel_log import KernelLog
from support.raw_device import ALICE, RawServer, as_user
from support.udev import settle
from support.waiting import until

bundled = pytest.mark.skipif(not driver.is_bundled(), reason="about the driver of kmod/")
BLKZEROOUT = 0x127F
TIB = 1 << 40


@pytest.mark.skipif(not has("UPDATE_SIZE"), reason="the driver has no limits of segments")
@pytest.mark.parametrize("limit", [["--max-segments", "1"], ["--virt-boundary", "8K"]], ids=["segments", "boundary"])
@pytest.mark.parametrize("block_size", [512, 4096])
def test_a_block_that_crosses_a_page_is_read_or_refused(limit: list[str], block_size: int, native: Face) -> None:
    path = native.add("-t", "mem", "--size", "16M", "--block-size", str(block_size), *limit)
    with Disk(path, direct=True, read_only=True) as disk:
        for skew in (0, 4, 512, 4092):
            refused = error_of(lambda at=skew: disk.read(0, block_size, skew=at))
            # Only for memory that is not aligned.
            assert refused == 0 or (refused == errno.EINVAL and skew % block_size), skew
    native.run("del", "-n", str(device_id(path)))


@bundled
@pytest.mark.parametrize("limit", [["--max-segments", "1"], ["--virt-boundary", "8K"]], ids=["segments", "boundary"])
def test_no_request_is_longer_than_the_servers_buffers(limit: list[str], native: Face) -> None:
    longest, length, skew = 64 << 10, 512 << 10, 512
    path = native.add("-t", "mem", "--size", "16M", "--block-size", "4K", "--max-io", "64K", *limit)
    # Pages that are touched from the last one on are rarely neighbours in physical memory.
    memory = mmap.mmap(-1, length + mmap.PAGESIZE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for at in range(length, -1, -mmap.PAGESIZE):
        memory[at] = 1
    with Disk(path, direct=True) as disk:
        before = b"\x5a" * longest
        for number in range(32):
            disk.write((8 << 20) + number * longest, before)
        with memoryview(memory) as view, view[skew : skew + length] as unaligned:
            refused = error_of(lambda: os.pwritev(disk.fd, [unaligned], 0))
        # The driver fails it if the block layer has not.
        assert refused in (0, errno.EINVAL)
        for number in range(32):
            assert disk.read((8 << 20) + number * longest, longest) == before, number
    native.run("del", "-n", str(device_id(path)))


@bundled
@pytest.mark.parametrize("granularity", [(1 << 31) + 512, (1 << 32) - 1])
def test_a_granularity_beyond_any_discard_is_refused(granularity: int) -> None:
    with raw.Control() as control:
        number = control.add(0, 4)
        try:
            with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
                control.set_parameters(number, 1 << 16, discard=(granularity, 8, 0))
            control.set_parameters(number, 1 << 16, discard=(1 << 31, 8, 0))
        finally:
            control.delete(number)


@bundled
def test_what_a_users_client_does_without_regard_to_signals_is_over_soon(for_users: None) -> None:
    refused = {
        "a large disk": (16 * TIB // 512 + 8, None),
        "short discards": (1 << 16, (4096, 8, 0)),
        "short write zeroes": (1 << 16, (4096, 0, 8)),
    }

    def add() -> int:
        with raw.Control() as control:
            return control.add(raw.UNPRIVILEGED_DEV, 4)

    def try_all() -> int:
        wrong = 0
        with raw.Control() as control:
            for sectors, discard in refused.values():
                found = error_of(lambda size=sectors, limits=discard: control.set_parameters(number, size, limits))
                wrong += found != errno.EINVAL
            short = error_of(lambda: control.set_parameters(number, TIB // 8 // 512 + 8, longest=8))
            wrong += short != errno.EINVAL
            control.set_parameters(number, TIB // 8 // 512, longest=8)
            control.set_parameters(number, 2 * TIB // 512, (4096, 2048, 2048))
        return wrong

    number = as_user(ALICE, add)
    node = raw.CHAR_DEVICE.format(number)
    until(lambda: os.path.exists(node), "the node")
    try:
        # As a rule of udev does.
        os.chown(node, ALICE, ALICE)
        assert as_user(ALICE, try_all) == 0
    finally:
        with raw.Control() as control:
            control.delete(number, by_path=True)


@bundled
def test_a_users_disk_that_grows_keeps_what_its_client_does_short(for_users: None) -> None:
    # Ranges as long as the disk are long enough, for this size.
    with RawServer(flags=raw.UNPRIVILEGED_DEV, uid=ALICE, sectors=8, discard=(4096, 8, 8)) as server:
        assert server.ask(f"server.resize({16 * TIB // 512})") == errno.EINVAL
        assert server.ask("server.resize(16)") == errno.EINVAL
        assert sysfs.size(server.node) == 8 * 512
        settle()
    # Requests of 64 KiB.
    with RawServer(flags=raw.UNPRIVILEGED_DEV, uid=ALICE, sectors=8, discard=(4096, 2048, 2048)) as server:
        assert server.ask(f"server.resize({2 * TIB // 512 + 8})") == errno.EINVAL
        assert server.ask(f"server.resize({2 * TIB // 512})") == 0
        assert sysfs.size(server.node) == 2 * TIB
        settle()


@bundled
def test_limits_of_discards_that_the_disk_does_not_have_do_not_limit_its_size(for_users: None) -> None:
    options = {"flags": raw.UNPRIVILEGED_DEV, "uid": ALICE, "sectors": 8, "discard": (4096, 8, 8)}
    with RawServer(**options, can_discard=False) as server:
        assert server.ask("server.resize(16)") == 0
        assert sysfs.size(server.node) == 16 * 512
        settle()


@pytest.mark.parametrize(("block_size", "size"), [(512, 4 << 30), (512, 5 << 30), (4096, 9 << 30)])
def test_zeroing_more_than_a_bio_holds_zeroes_all(block_size: int, size: int, native: Face) -> None:
    path = native.add("-t", "null", "--size", "16G", "--block-size", str(block_size))
    number = str(device_id(path))
    with Disk(path, direct=False) as disk:
        fcntl.ioctl(disk.fd, BLKZEROOUT, struct.pack("=QQ", 0, size))
    zeroed = json.loads(native.run("stat", "-n", number, "--json").out)["total"]["write-zeroes"]
    assert (zeroed["bytes"], zeroed["errors"]) == (size, 0)
    native.run("del", "-n", number)


@pytest.fixture
def quiet_udev() -> Iterator[None]:
    """udev looks at no disk meanwhile: its open would set the block size of the page cache."""
    settle()
    run(["udevadm", "control", "--stop-exec-queue"])
    yield
    run(["udevadm", "control", "--start-exec-queue"])


def make_fat(path: str | os.PathLike, sectors: int) -> None:
    """An empty FAT32 file system with blocks of 512 bytes: 32 reserved sectors and two FATs of 512 sectors."""
    with open(path, "r+b") as file:
        # Bytes of a sector, sectors of a cluster, reserved sectors, FATs, entries of the root directory, sectors,
        # medium, sectors of a FAT, of a track, heads, hidden sectors, sectors, sectors of a FAT.
        geometry = struct.pack("<HBHBHHBHHHIII", 512, 1, 32, 2, 0, 0, 0xF8, 0, 63, 255, 0, sectors, 512)
        # Flags, version, root directory, sectors of information and of the copy.
        geometry += struct.pack("<HHIHH", 0, 0, 2, 1, 6)
        boot = bytearray(512)
        boot[:11] = b"\xeb\x58\x90MSWIN4.1"
        boot[11 : 11 + len(geometry)] = geometry
        boot[66] = 0x29
        boot[82:90] = b"FAT32   "
        boot[510:] = b"\x55\xaa"
        information = bytearray(512)
        information[:4], information[484:488] = b"RRaA", b"rrAa"
        information[488:492] = b"\xff" * 4
        information[510:] = b"\x55\xaa"
        file.write(boot + information)
        for fat in (32, 544):
            file.seek(fat * 512)
            file.write(struct.pack("<III", 0x0FFFFFF8, 0x0FFFFFFF, 0x0FFFFFFF))


def test_the_partition_scan_leaves_no_blocks_of_another_size(scratch: Path, quiet_udev: None, native: Face) -> None:
    # The disk is no multiple of 4096 bytes: the first open sets the block size of the page cache to 512.
    file = image(scratch, 66001 * 512)
    make_fat(file, 66000)
    run(["modprobe", "vfat"])
    path = native.add("-t", "file", "-f", file, settle=False)
    # Until the scan is over.
    until(lambda: sysfs.requests(path), "the partition scan")
    time.sleep(1)
    mounted = scratch / "mounted"
    mounted.mkdir()
    with contextlib.closing(KernelLog()) as log:
        run(["mount", "-t", "vfat", path, mounted])
        run(["umount", mounted])
        log.read()
    assert not [text for _level, text in log.lines if "find_get_block" in text]
    mounted.rmdir()
    native.run("del", "-n", str(device_id(path)))
