# SPDX-License-Identifier: MIT OR Apache-2.0
"""Every way in which data and tags move between the driver and a server."""

from pathlib import Path

import pytest
from support import fio, sysfs
from support.backends import image
from support.blockio import Disk
from support.command import run
from support.face import Face, device_id
from support.features import has
from support.model import Model, exercise

SIZE = 16 << 20

# What a movement asks the driver for, and since which kernel that exists.
NEEDS = {
    "copy": ("CMD_IOCTL_ENCODE", "6.4"),
    "get-data": ("NEED_GET_DATA", "6.0"),
    "user-copy": ("USER_COPY", "6.5"),
    "zero-copy": ("SUPPORT_ZERO_COPY", "6.15"),
    "auto-zero-copy": ("AUTO_BUF_REG", "6.16"),
}
BATCH = ("BATCH_IO", "7.0")

every_movement = pytest.mark.parametrize("data", NEEDS)
with_and_without_batches = pytest.mark.parametrize("batch", ["on", "off"])


def add(native: Face, scratch: Path, kind: str, data: str, batch: str, *more: str) -> str | None:
    """A device; `None` if the driver cannot have it, and has said so."""
    if batch == "on" and data == "get-data":
        pytest.skip("no batches with get-data")
    words = ["-t", kind, "-q", "2", "--data", data, "--batch", batch, *more]
    words += ["-f", str(image(scratch, SIZE))] if kind == "file" else ["--size", str(SIZE)]
    missing = [(name, since) for name, since in [NEEDS[data]] + [BATCH] * (batch == "on") if not has(name)]
    if missing:
        refused = native.run("add", *words, check=False)
        assert refused.status == 1, str(refused)
        assert any(name in refused.err and since in refused.err for name, since in missing), str(refused)
        return None
    path = native.add(*words)
    info = native.info(path)
    assert (info["data"], info["batch"]) == (data, batch == "on")
    return path


@pytest.mark.short
@every_movement
@with_and_without_batches
@pytest.mark.parametrize("kind", ["mem", "file"])
def test_data_is_kept_or_the_kernel_that_could_is_named(
    kind: str, data: str, batch: str, native: Face, scratch: Path
) -> None:
    path = add(native, scratch, kind, data, batch)
    if path is None:
        return
    with Disk(path, direct=True) as disk:
        exercise(disk, Model(SIZE), unit=512, longest=512 << 10, steps=120, seed=60, zeroing=True)
    native.run("del", "-n", str(device_id(path)))


@pytest.mark.long
@every_movement
@with_and_without_batches
def test_many_requests_at_once_are_verified(data: str, batch: str, native: Face, scratch: Path) -> None:
    path = add(native, scratch, "file", data, batch)
    if path is None:
        return
    fio.verify(path, size="8m", bssplit="4k/60:16k/20:64k/15:256k/5", iodepth=64, numjobs=1)
    native.run("del", "-n", str(device_id(path)))


@pytest.mark.skipif(not has("AUTO_BUF_REG"), reason="AUTO_BUF_REG came with Linux 6.16")
def test_a_file_is_served_without_copies_and_the_list_says_why(native: Face, scratch: Path) -> None:
    path = native.add("-t", "file", "-f", image(scratch, SIZE))
    info = native.info(path)
    assert info["data"] == "auto-zero-copy"
    assert "forwarded" in info["data_reason"]
    assert "auto-zero-copy" in native.run("list").out
    native.run("del", "-n", str(device_id(path)))


def test_a_ram_disk_gets_its_bytes(native: Face) -> None:
    path = native.add("-t", "mem", "--size", "1M")
    assert native.info(path)["data"] == "copy"
    assert native.info(path)["batch"] == has("BATCH_IO")
    native.run("del", "-n", str(device_id(path)))


@pytest.mark.parametrize(
    "data",
    [pytest.param("copy", marks=pytest.mark.long), pytest.param("user-copy", marks=pytest.mark.long), "auto-zero-copy"],
)
def test_several_threads_share_a_queue(data: str, native: Face, scratch: Path) -> None:
    words = ["-t", "file", "-f", image(scratch, SIZE), "--data", data, "--threads-per-queue", "3", "--threads", "3"]
    if not (has("PER_IO_DAEMON") and has(NEEDS[data][0])):
        refused = native.run("add", *words, check=False)
        assert refused.status == 1, str(refused)
        assert "Linux 6." in refused.err, str(refused)
        return
    path = native.add(*words)
    with Disk(path, direct=True) as disk:
        exercise(disk, Model(SIZE), unit=512, longest=256 << 10, steps=60, seed=61)
    fio.verify(path, size="8m", bs="4k", iodepth=64)
    native.run("del", "-n", str(device_id(path)))


@pytest.mark.skipif(not has("AUTO_BUF_REG"), reason="AUTO_BUF_REG came with Linux 6.16")
def test_clients_memory_is_aligned_as_the_file_below_demands(native: Face, scratch: Path) -> None:
    path = native.add("-t", "file", "-f", image(scratch, SIZE), "--io", "direct")
    # A mask. Whatever it is, requests that it lets through succeed.
    alignment = sysfs.number(path, "queue/dma_alignment") + 1
    with Disk(path, direct=True) as disk:
        model = Model(SIZE)
        for skew in range(0, 4096, max(alignment, 64)):
            model.write(disk, skew // 64 * 4096, bytes([skew & 0xFF]) * 4096, skew=skew)
        model.check(disk)
    native.run("del", "-n", str(device_id(path)))


def test_wishes_that_contradict_each_other_are_refused(native: Face) -> None:
    for words in (
        ["--batch", "on", "--data", "get-data"],
        ["--batch", "on", "--threads-per-queue", "2"],
        ["--threads-per-queue", "0"],
        ["--threads-per-queue", "129"],
    ):
        refused = native.run("add", "-t", "null", *words, check=False)
        assert refused.status == 1, str(refused)
        assert refused.err.startswith("ublk: "), str(refused)
    assert run(["ublk", "add", "-t", "null", "--data", "telepathy"], check=False).status == 2
