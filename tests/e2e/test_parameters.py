# SPDX-License-Identifier: MIT OR Apache-2.0
"""What `ublk add` says about a disk is what the kernel and `ublk list` say about it."""

import mmap
import os
from pathlib import Path
from typing import Any

import pytest
from support import sysfs
from support.blockio import Disk
from support.command import run
from support.features import has

pytestmark = pytest.mark.long

# They came with 6.15, the feature with 6.16; no driver that this is run on is from between.
HAS_SEGMENTS = has("UPDATE_SIZE")
HAS_NO_SCAN = has("NO_AUTO_PART_SCAN")

KIB = 1024
MIB = 1024 * KIB


def look(info: dict[str, Any], name: str) -> Any:
    """An entry of the list, or of something inside it."""
    for part in name.split("."):
        info = info[part]
    return info


# The words for `ublk add`; attributes of the disk in sysfs; entries of `ublk list --json`.
EVERYWHERE = {
    "block sizes": (
        ["--block-size", "1K", "--physical-block-size", "4K"],
        {"queue/logical_block_size": 1024, "queue/physical_block_size": 4096, "queue/minimum_io_size": 4096},
        {"block_size": 1024, "physical_block_size": 4096, "io_min": 4096},
    ),
    "io_min": (["--io-min", "16K"], {"queue/minimum_io_size": 16 * KIB}, {"io_min": 16 * KIB}),
    "io_opt": (["--io-opt", "64K"], {"queue/optimal_io_size": 64 * KIB}, {"io_opt": 64 * KIB}),
    "max_io": (["--max-io", "1M"], {"queue/max_hw_sectors_kb": 1024}, {"max_io_bytes": MIB}),
    "chunk": (["--chunk-size", "128K"], {"queue/chunk_sectors": 256}, {"chunk_size": 128 * KIB}),
    "chunk that is no power of two": (
        ["--chunk-size", "192K"],
        {"queue/chunk_sectors": 384},
        {"chunk_size": 192 * KIB},
    ),
    "virt boundary": (
        ["--virt-boundary", "4K"],
        {"queue/virt_boundary_mask": 4095},
        {"virt_boundary_mask": 4095},
    ),
    # The disk's discard_alignment in sysfs stays 0, whatever the driver is given (seen on 7.3).
    "discard": (
        [
            "--discard-granularity",
            "8K",
            "--discard-alignment",
            "4K",
            "--max-discard",
            "16M",
            "--max-write-zeroes",
            "8M",
        ],
        {
            "queue/discard_granularity": 8 * KIB,
            "queue/discard_max_bytes": 16 * MIB,
            "queue/discard_max_hw_bytes": 16 * MIB,
            "queue/write_zeroes_max_bytes": 8 * MIB,
        },
        {
            "discard_limits.granularity": 8 * KIB,
            "discard_limits.alignment": 4 * KIB,
            "discard_limits.max_discard": 16 * MIB,
            "discard_limits.max_write_zeroes": 8 * MIB,
        },
    ),
    "no discard": (
        ["--max-discard", "0"],
        {"queue/discard_max_bytes": 0},
        {"discard": False, "write_zeroes": True, "discard_limits.max_discard": 0},
    ),
    "no write zeroes": (
        ["--max-write-zeroes", "0"],
        {"queue/write_zeroes_max_bytes": 0},
        {"discard": True, "write_zeroes": False},
    ),
    "read-only": (["--read-only"], {"ro": 1}, {"read_only": True}),
    "rotational": (["--rotational"], {"queue/rotational": 1}, {"rotational": True}),
    "write cache with FUA": (
        ["--write-cache", "on", "--fua", "on"],
        {"queue/write_cache": "write back", "queue/fua": 1},
        {"write_cache": True, "fua": True},
    ),
    "write cache without FUA": (
        ["--write-cache", "on", "--fua", "off"],
        {"queue/write_cache": "write back", "queue/fua": 0},
        {"write_cache": True, "fua": False},
    ),
    "no write cache": (
        ["--write-cache", "off"],
        {"queue/write_cache": "write through", "queue/fua": 0},
        {"write_cache": False, "fua": False},
    ),
}

# Parameters of Linux 6.15.
SEGMENTS = {
    "DMA alignment": (["--dma-alignment", "512"], {"queue/dma_alignment": 511}, {"dma_alignment": 512}),
    "DMA alignment of a page": (["--dma-alignment", "4K"], {"queue/dma_alignment": 4095}, {"dma_alignment": 4096}),
    "segments": (
        ["--max-segments", "32", "--max-segment-size", "32K", "--segment-boundary", "64K"],
        {"queue/max_segments": 32, "queue/max_segment_size": 32 * KIB},
        {"segments.max_count": 32, "segments.max_size": 32 * KIB, "segments.boundary_mask": 65535},
    ),
    # The others are not limited then.
    "segment count alone": (
        ["--max-segments", "7"],
        {"queue/max_segments": 7, "queue/max_segment_size": 2**32 - 1},
        {"segments.max_count": 7, "segments.max_size": 0, "segments.boundary_mask": 0},
    ),
    "segment size alone": (
        ["--max-segment-size", "4K"],
        {"queue/max_segments": 65535, "queue/max_segment_size": 4096},
        {"segments.max_count": 0, "segments.max_size": 4096},
    ),
    "segment boundary alone": (
        ["--segment-boundary", "4K"],
        {"queue/max_segments": 65535, "queue/max_segment_size": 2**32 - 1},
        {"segments.boundary_mask": 4095},
    ),
}


def check(path: str, native, attributes: dict[str, Any], entries: dict[str, Any]) -> None:
    found = {}
    for name, value in attributes.items():
        text = sysfs.attribute(path, name)
        found[name] = text if isinstance(value, str) else int(text)
    assert found == attributes
    info = native.info(path)
    assert {name: look(info, name) for name in entries} == entries


@pytest.mark.parametrize("name", EVERYWHERE)
def test_an_attribute_is_as_it_was_asked_for(name: str, native_disk, native) -> None:
    words, attributes, entries = EVERYWHERE[name]
    path = native_disk("-t", "null", "--size", "64M", *words)
    check(path, native, attributes, entries)


@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.skipif(not HAS_SEGMENTS, reason="Linux 6.15")
def test_memory_is_limited_as_it_was_asked_for(name: str, native_disk, native) -> None:
    words, attributes, entries = SEGMENTS[name]
    path = native_disk("-t", "mem", "--size", "64M", *words)
    check(path, native, attributes, entries)
    # It works, too.
    with Disk(path, direct=True) as disk:
        data = os.urandom(MIB)
        disk.write(4096, data)
        assert disk.read(4096, MIB) == data


@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.skipif(HAS_SEGMENTS, reason="this driver has it")
def test_an_older_driver_is_named_as_the_reason(name: str, native) -> None:
    words = SEGMENTS[name][0]
    result = native.run("add", "-t", "null", *words, check=False)
    assert result.status == 1, str(result)
    assert "6.15" in result.err, str(result)
    assert ("DMA alignment" if "dma" in words[0] else "segments") in result.err, str(result)
    assert native.list() == []


def test_the_text_of_the_list_tells_what_is_special(native_disk, native) -> None:
    native_disk("-t", "null", "--chunk-size", "128K", "--virt-boundary", "4K", "--io-opt", "64K")
    text = native.run("list").out
    for words in ("chunk size 131072", "virt boundary mask 0xfff", "io_opt 65536"):
        assert words in text, text


def test_direct_io_keeps_to_the_alignment_of_memory(native_disk) -> None:
    if not HAS_SEGMENTS:
        pytest.skip("Linux 6.15")
    path = native_disk("-t", "mem", "--size", "1M", "--dma-alignment", "4K")
    memory = mmap.mmap(-1, 3 * 4096)
    descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        assert os.preadv(descriptor, [memoryview(memory)[:4096]], 0) == 4096
        with pytest.raises(OSError, match="Invalid argument"):
            os.preadv(descriptor, [memoryview(memory)[512 : 512 + 4096]], 0)
    finally:
        os.close(descriptor)


def test_no_request_crosses_a_chunk(native_disk) -> None:
    path = native_disk("-t", "null", "--size", "64M", "--chunk-size", "64K", "--max-io", "1M")
    before = int(sysfs.attribute(path, "stat").split()[0])
    with Disk(path, direct=True) as disk:
        disk.read(32 * KIB, 128 * KIB)
    # One half chunk, a whole one, another half.
    assert int(sysfs.attribute(path, "stat").split()[0]) - before == 3


def partitioned(scratch: Path) -> Path:
    """The image of a disk with one partition."""
    image = scratch / "partitioned.img"
    with image.open("wb") as file:
        file.truncate(8 * MIB)
    run(["sfdisk", "--quiet", image], input="2048,4096,L\n")
    return image


def test_partitions_are_looked_for_unless_it_is_forbidden(native_disk, native, scratch) -> None:
    image = partitioned(scratch)
    path = native_disk("-t", "file", "-f", image)
    assert Path(f"{path}p1").exists()
    assert native.info(path)["partition_scan"] is True
    native_disk.remove_one(path)
    if HAS_NO_SCAN:
        path = native_disk("-t", "file", "-f", image, "--no-partition-scan")
        assert not Path(f"{path}p1").exists()
        assert native.info(path)["partition_scan"] is False
        run(["blockdev", "--rereadpt", path])
        assert Path(f"/sys/block/{os.path.basename(path)}/{os.path.basename(path)}p1").exists()
    else:
        result = native.run("add", "-t", "file", "-f", image, "--no-partition-scan", check=False)
        assert result.status == 1, str(result)
        assert "NO_AUTO_PART_SCAN" in result.err, str(result)
        assert "7.0" in result.err, str(result)
        assert native.list() == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--physical-block-size", "256"], "physical block size = 256"),
        (["--io-min", "3000"], "io_min = 3000"),
        (["--io-opt", "1000"], "io_opt = 1000"),
        (["--chunk-size", "1000"], "chunk size = 1000"),
        (["--virt-boundary", "3000"], "virt boundary = 3000"),
        (["--dma-alignment", "3"], "DMA alignment = 3"),
        (["--dma-alignment", "1"], "DMA alignment = 1"),
        (["--dma-alignment", "8K"], "DMA alignment = 8192"),
        (["--max-segment-size", "512"], "maximum segment size = 512"),
        (["--segment-boundary", "2K"], "segment boundary = 2048"),
        (["--segment-boundary", "0"], "segment boundary = 0"),
        (["--discard-granularity", "1000"], "discard granularity = 1000"),
        (["--discard-granularity", "8K", "--discard-alignment", "8K"], "discard alignment = 8192"),
        (["--max-discard", "100"], "longest discard = 100"),
        (["--max-write-zeroes", "3T"], "longest write of zeros = 3298534883328"),
        (["--write-cache", "off", "--fua", "on"], "FUA without FLUSH"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(words: list[str], says: str, native) -> None:
    result = native.run("add", "-t", "null", *words, check=False)
    assert result.status == 1, str(result)
    assert says in result.err, str(result)
    assert native.list() == []
