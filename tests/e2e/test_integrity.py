# SPDX-License-Identifier: MIT OR Apache-2.0
"""Integrity metadata: the block layer makes it and checks it, the RAM disk keeps it and checks it too."""

import errno
import json
import os
import signal
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import fio, sysfs
from support.backends import added, image
from support.blockio import Disk, error_of
from support.command import run
from support.face import Face, device_id
from support.features import has
from support.server import Server
from support.uring import Ring

pytestmark = pytest.mark.long

KIB = 1024

# The kernel's names of what the options make.
FORMATS = {
    "ip": "T10-DIF-TYPE1-IP",
    "crc16-t10dif": "T10-DIF-TYPE1-CRC",
    "crc64-nvme": "EXT-DIF-TYPE1-CRC64",
}

needs_integrity = pytest.mark.skipif(not has("INTEGRITY"), reason="the driver has no integrity metadata (7.0)")


def setting(path: str, name: str, value: str) -> None:
    Path("/sys/block", os.path.basename(path), "integrity", name).write_text(value)


def errors(native: Face, path: str) -> int:
    stat = json.loads(native.run("stat", "-n", str(device_id(path)), "--json").out)["total"]
    return sum(operation["errors"] for operation in stat.values())


@needs_integrity
@pytest.mark.parametrize("more", [[], ["--pi-offset", "8"], ["--block-size", "4K"]], ids=" ".join)
@pytest.mark.parametrize("checksum", FORMATS)
def test_what_the_kernel_makes_is_what_the_disk_expects(
    checksum: str, more: list[str], native_disk, native: Face
) -> None:
    path = native_disk("-t", "mem", "--size", "8M", "-q", "2", "--integrity", checksum, *more)
    assert sysfs.attribute(path, "integrity/format") == FORMATS[checksum]
    size = 16 if checksum == "crc64-nvme" else 8
    offset = 8 if "--pi-offset" in more else 0
    block = 4096 if "--block-size" in more else 512
    assert sysfs.number(path, "integrity/protection_interval_bytes") == block
    expected = {"checksum": checksum, "metadata_size": size + offset, "pi_offset": offset, "interval": block}
    found = native.info(path)["integrity"]
    assert {key: found[key] for key in expected} == expected
    assert found["reference_tag"] is True
    assert native.info(path)["data"] == "user-copy"
    with Disk(path, direct=True) as disk:
        # Never written: nothing to check.
        assert disk.read(0, 64 * KIB) == bytes(64 * KIB)
        data = os.urandom(256 * KIB)
        disk.write(64 * KIB, data)
        assert disk.read(64 * KIB, len(data)) == data
        disk.punch(128 * KIB, 64 * KIB)
        assert disk.read(64 * KIB, 64 * KIB) == data[: 64 * KIB]
        disk.read(128 * KIB, 64 * KIB)
    fio.verify(path, size="2m", bs="4k", iodepth=16)
    assert errors(native, path) == 0


@needs_integrity
def test_opaque_metadata_is_carried(native_disk, native: Face) -> None:
    path = native_disk("-t", "mem", "--size", "8M", "--integrity", "none", "--metadata-size", "64")
    assert native.info(path)["integrity"]["metadata_size"] == 64
    with Disk(path, direct=True) as disk:
        data = os.urandom(64 * KIB)
        disk.write(0, data)
        assert disk.read(0, len(data)) == data
    assert errors(native, path) == 0


@needs_integrity
def test_a_shorter_interval_than_a_block(native_disk, native: Face) -> None:
    path = native_disk(
        *("-t", "mem", "--size", "8M", "--block-size", "4K", "--integrity", "crc16-t10dif"),
        *("--integrity-interval", "512"),
    )
    assert sysfs.number(path, "integrity/protection_interval_bytes") == 512
    fio.verify(path, size="1m", bs="4k", iodepth=4)
    assert errors(native, path) == 0


@needs_integrity
def test_a_write_without_metadata_is_not_held_against_what_was_there(native_disk, native: Face) -> None:
    path = native_disk("-t", "mem", "--size", "1M", "--integrity", "crc16-t10dif")
    with Disk(path, direct=True) as disk:
        disk.write(0, os.urandom(8 * KIB))
        setting(path, "write_generate", "0")
        data = os.urandom(4 * KIB)
        disk.write(0, data)
        assert disk.read(0, 4 * KIB) == data
    assert errors(native, path) == 0


@needs_integrity
@pytest.mark.io_errors("protection error", "guard tag error", "ref tag error")
def test_metadata_really_comes_back(native_disk, native: Face) -> None:
    # With more metadata than the protection information there always is some. If it is to make none, the kernel sends
    # zeros ...
    path = native_disk("-t", "mem", "--size", "1M", "--integrity", "crc16-t10dif", "--pi-offset", "8")
    with Disk(path, direct=True) as disk:
        disk.write(0, os.urandom(8 * KIB))
        setting(path, "write_generate", "0")
        data = os.urandom(4 * KIB)
        disk.write(0, data)
        # ... and finds them wrong.
        assert error_of(lambda: disk.read(0, 4 * KIB)) == errno.EILSEQ
        assert len(disk.read(4 * KIB, 4 * KIB)) == 4 * KIB
        setting(path, "read_verify", "0")
        assert disk.read(0, 4 * KIB) == data
    assert errors(native, path) == 0


def crc16_t10dif(data: bytes) -> int:
    """The checksum of T10 protection information: polynomial 0x8bb7, nothing inverted."""
    crc = 0
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ (0x8BB7 if crc & 0x8000 else 0)) & 0xFFFF
    return crc


def protection(data: bytes, first_block: int, application: int) -> bytes:
    """Type 1 protection information of blocks of 512 bytes: guard, application tag, reference tag."""
    blocks = [data[at : at + 512] for at in range(0, len(data), 512)]
    return b"".join(
        struct.pack(">HHI", crc16_t10dif(block), application, first_block + index) for index, block in enumerate(blocks)
    )


@needs_integrity
@pytest.mark.io_errors("protection error")
@pytest.mark.parametrize("kind", ["mem", "file"])
def test_metadata_of_a_clients_own_is_carried_and_checked(kind: str, native_disk, native: Face, scratch: Path) -> None:
    more = ["--size", "1M"] if kind == "mem" else ["-f", image(scratch, 1 << 20), "--io", "direct"]
    path = native_disk("-t", kind, *more, "--integrity", "crc16-t10dif")
    with Ring() as ring, Disk(path, direct=True) as disk:
        if not ring.takes_metadata:
            pytest.skip("clients can bring metadata from Linux 6.14 on")
        data, offset = os.urandom(8 * KIB), 16 * KIB
        mine = protection(data, offset // 512, 0x1234)
        ring.write(disk.fd, offset, data, mine, seed=offset // 512)
        # The application tag belongs to the client alone.
        assert ring.read(disk.fd, offset, len(data), len(mine), seed=offset // 512) == (data, mine)
        assert disk.read(offset, len(data)) == data
        wrong = bytearray(mine)
        wrong[8] ^= 1
        other = bytes(len(data))
        refused = error_of(lambda: ring.write(disk.fd, offset, other, bytes(wrong), seed=offset // 512))
        assert refused == errno.EILSEQ
        assert disk.read(offset, len(data)) == data
    assert errors(native, path) == 1


@needs_integrity
def test_a_file_system_lives_on_it(native_disk, native: Face, tmp_path: Path) -> None:
    path = native_disk("-t", "mem", "--size", "32M", "--block-size", "4K", "--integrity", "crc64-nvme")
    run(["mkfs.ext4", "-q", path])
    run(["mount", path, tmp_path])
    try:
        data = os.urandom(4 << 20)
        (tmp_path / "file").write_bytes(data)
        run(["sync"])
        Path("/proc/sys/vm/drop_caches").write_text("3")
        assert (tmp_path / "file").read_bytes() == data
    finally:
        run(["umount", tmp_path])
    run(["e2fsck", "-fn", path])
    assert errors(native, path) == 0


@needs_integrity
@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_a_files_metadata_outlives_its_server(io: str, native: Face, scratch: Path) -> None:
    file = image(scratch)
    words = ("-t", "file", "-f", file, "--io", io, "--integrity", "crc64-nvme", "--recovery", "-q", "2")
    path = native.add(*words)
    number = str(device_id(path))
    data = os.urandom(256 * KIB)
    with Disk(path, direct=True) as disk:
        disk.write(64 * KIB, data)
        disk.write_durably(1024 * KIB, data)
        disk.sync()
        disk.discard(1024 * KIB, 64 * KIB)
    fio.verify(path, offset="2m", size="2m", bs="4k", iodepth=16)
    assert errors(native, path) == 0
    os.kill(native.info(path)["pid"], signal.SIGKILL)
    native.run("recover", "-n", number, timeout=60)
    with Disk(path, direct=True) as disk:
        assert disk.read(64 * KIB, len(data)) == data
    native.run("del", "-n", number)
    assert (scratch / "disk.img.integrity").stat().st_size > 0
    path = native.add(*words, "--read-only")
    with Disk(path, direct=True, read_only=True) as disk:
        assert disk.read(64 * KIB, len(data)) == data
        assert disk.read(1088 * KIB, 64 * KIB) == data[64 * KIB : 128 * KIB]
    native.run("del", "-n", str(device_id(path)))


@needs_integrity
@pytest.mark.parametrize("kind", ["mem", "file"])
def test_a_reader_beside_a_writer_never_sees_a_mismatch(kind: str, native_disk, native: Face, scratch: Path) -> None:
    more = ["--size", "1M"] if kind == "mem" else ["-f", image(scratch, 1 << 20), "--io", "direct"]
    path = native_disk("-t", kind, *more, "--integrity", "crc16-t10dif", "-q", "2")
    length, stop = 32 * KIB, threading.Event()
    # A queue for each CPU: the writer's is not the readers'.
    cpus = sorted(os.sched_getaffinity(0))

    def read(cpu: int) -> None:
        os.sched_setaffinity(0, {cpu})
        with Disk(path, direct=True) as disk:
            while not stop.is_set():
                assert len(disk.read(0, length)) == length

    with ThreadPoolExecutor() as pool, Disk(path, direct=True) as disk:
        readers = [pool.submit(read, cpu) for cpu in cpus]
        try:
            for _ in range(300):
                disk.write(0, os.urandom(length))
        finally:
            stop.set()
        for reader in readers:
            reader.result()
    assert errors(native, path) == 0


@needs_integrity
@pytest.mark.io_errors
def test_a_write_that_fails_leaves_its_blocks_readable(native: Face, scratch: Path) -> None:
    with Server("Failing", size=1 << 20) as server:
        words = ("-f", server.path, "--io", "direct", "--integrity-file", str(scratch / "metadata"))
        with added("-t", "file", *words, "--integrity", "crc16-t10dif") as path, Disk(path, direct=True) as disk:
            data = os.urandom(8 * KIB)
            disk.write(0, data)
            server.ask("disk.fail('write', 'OSError(5, \"the store below is gone\")')")
            assert error_of(lambda: disk.write(0, os.urandom(8 * KIB))) == errno.EIO
            server.ask("disk.fail('', 'None')")
            assert disk.read(0, 8 * KIB) == data
            disk.write(0, data)
            assert disk.read(0, 8 * KIB) == data


@needs_integrity
@pytest.mark.io_errors("protection error")
def test_a_file_that_was_changed_behind_its_metadata_is_found_out(native: Face, scratch: Path) -> None:
    file = image(scratch)
    path = native.add("-t", "file", "-f", file, "--io", "direct", "--integrity", "crc16-t10dif")
    data = os.urandom(64 * KIB)
    with Disk(path, direct=True) as disk:
        disk.write(0, data)
        with file.open("r+b") as changed:
            changed.seek(5000)
            changed.write(bytes([data[5000] ^ 1]))
            os.fsync(changed.fileno())
        assert error_of(lambda: disk.read(4 * KIB, 4 * KIB)) == errno.EILSEQ
        assert disk.read(0, 4 * KIB) == data[: 4 * KIB]
        # Written anew, it is whole again.
        disk.write(4 * KIB, data[: 4 * KIB])
        assert disk.read(4 * KIB, 4 * KIB) == data[: 4 * KIB]
    assert errors(native, path) == 1
    native.run("del", "-n", str(device_id(path)))


@pytest.mark.skipif(has("INTEGRITY"), reason="this driver has it")
def test_an_older_driver_is_named_as_the_reason(native: Face) -> None:
    refused = native.run("add", "-t", "mem", "--size", "1M", "--integrity", "ip", check=False)
    assert refused.status == 1, str(refused)
    assert "INTEGRITY" in refused.err, str(refused)
    assert "7.0" in refused.err, str(refused)
    assert native.list() == []


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["-t", "null", "--integrity", "ip"], 1, "only supported by -t mem and -t file"),
        (["-t", "mem", "--integrity", "ip", "--metadata-size", "4"], 1, "offset of the protection information"),
        (["-t", "mem", "--integrity", "ip", "--integrity-interval", "4K"], 1, "integrity interval = 4096"),
        (["-t", "mem", "--metadata-size", "8"], 2, "--integrity"),
        (["-t", "mem", "--integrity", "md5"], 2, "crc64-nvme"),
    ],
)
def test_metadata_that_cannot_be_is_refused(words: list[str], status: int, says: str, native: Face) -> None:
    refused = native.run("add", *words, check=False)
    assert refused.status == status, str(refused)
    assert says in refused.err, str(refused)
    assert native.list() == []
