# SPDX-License-Identifier: MIT OR Apache-2.0
"""Partition tables and file systems on our disks."""

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import udev
from support.backends import added, image
from support.blockio import Disk
from support.command import run
from support.server import Server
from support.waiting import until

DISKS = ["mem", "file", "python"]


@contextmanager
def disk_of(kind: str, size: int, scratch: Path) -> Iterator[str]:
    if kind == "mem":
        with added("-t", "mem", "--size", str(size), "-q", "2") as path:
            yield path
    elif kind == "file":
        with added("-t", "file", "-f", str(image(scratch, size)), "-q", "2") as path:
            yield path
    else:
        with Server("Ram", size=size, queues=2) as server:
            yield server.path


@contextmanager
def mounted(path: str, directory: Path, *options: str) -> Iterator[Path]:
    directory.mkdir(exist_ok=True)
    run(["mount", *options, path, directory])
    try:
        yield directory
    finally:
        run(["umount", directory])


def fill(directory: Path, seed: int, files: int) -> dict[str, str]:
    """Makes files of all sizes and returns their digests."""
    numbers = random.Random(seed)
    digests = {}
    for index in range(files):
        name = f"d{index % 7}/f{index}"
        content = numbers.randbytes(numbers.choice([0, 1, 511, 4096, 20_000, 300_000]))
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
        digests[name] = hashlib.sha256(content).hexdigest()
    return digests


def check(directory: Path, digests: dict[str, str]) -> None:
    found = {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in directory.rglob("f*")
        if file.is_file()
    }
    assert found == digests


MAKE = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"], "btrfs": ["mkfs.btrfs", "-q", "-f"]}
CHECK = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"], "btrfs": ["btrfs", "check", "--readonly"]}
SIZE = {"ext4": 64 << 20, "xfs": 300 << 20, "btrfs": 128 << 20}


@pytest.mark.parametrize(
    ("kind", "system"),
    [
        pytest.param("mem", "ext4", marks=pytest.mark.short),
        ("file", "ext4"),
        pytest.param("python", "ext4", marks=pytest.mark.short),
        pytest.param("mem", "xfs", marks=pytest.mark.long),
        pytest.param("mem", "btrfs", marks=pytest.mark.long),
    ],
)
def test_a_file_system_keeps_its_files(kind: str, system: str, tmp_path: Path, scratch: Path) -> None:
    with disk_of(kind, SIZE[system], scratch) as path:
        run([*MAKE[system], path], timeout=50)
        with mounted(path, tmp_path / "mount") as directory:
            digests = fill(directory, seed=40, files=60)
        run([*CHECK[system], path])
        # Nothing of it comes from the page cache of the first mount.
        with Disk(path, direct=False, read_only=True) as disk:
            disk.drop_cache()
        with mounted(path, tmp_path / "mount", "-o", "ro") as directory:
            check(directory, digests)


@pytest.mark.parametrize("kind", DISKS)
def test_partitions_appear_when_the_table_is_written(kind: str, scratch: Path) -> None:
    with disk_of(kind, 64 << 20, scratch) as path:
        run(["sfdisk", "--quiet", path], input="label: gpt\nsize=16MiB\nsize=24MiB\n")
        udev.settle()
        assert int(Path(f"/sys/class/block/{os.path.basename(path)}p1/size").read_text()) == 16 << 11
        assert int(Path(f"/sys/class/block/{os.path.basename(path)}p2/size").read_text()) == 24 << 11
        data = random.Random(41).randbytes(1 << 20)
        with Disk(f"{path}p2", direct=True) as second:
            second.write((24 << 20) - len(data), data)
        with Disk(path, direct=True) as whole:
            assert whole.read(((1 + 16 + 24) << 20) - len(data), len(data)) == data
        udev.settle()


def test_partitions_appear_when_a_disk_with_a_table_is_added(scratch: Path) -> None:
    file = image(scratch, 64 << 20)
    run(["sfdisk", "--quiet", file], input="label: dos\nsize=10MiB\nsize=20MiB\n")
    with added("-t", "file", "-f", str(file)) as path:
        # Newer kernels look for partitions after the disk was announced.
        until(lambda: os.path.exists(f"{path}p2"), f"{path}p2")
        udev.settle()
        assert int(Path(f"/sys/class/block/{os.path.basename(path)}p1/size").read_text()) == 10 << 11


def test_trim_of_a_mounted_file_system_reaches_the_file(tmp_path: Path, scratch: Path) -> None:
    file = image(scratch, 128 << 20)
    with added("-t", "file", "-f", str(file)) as path:
        run(["mkfs.ext4", "-q", "-F", path])
        with mounted(path, tmp_path / "mount") as directory:
            (directory / "big").write_bytes(os.urandom(64 << 20))
            os.sync()
            before = file.stat().st_blocks * 512
            (directory / "big").unlink()
            os.sync()
            run(["fstrim", directory])
            after = file.stat().st_blocks * 512
        assert before - after >= 60 << 20, (before, after)
