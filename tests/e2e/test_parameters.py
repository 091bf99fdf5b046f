# SPDX-License-Identifier: MIT OR Apache-2.0
"""What is said of a disk when it is added is what the kernel says of it."""

from pathlib import Path

import pytest
from support import sysfs
from support.backends import image
from support.command import run
from support.face import Face, device_id
from support.features import has

# Option, value, attribute in sysfs, its value there; and, where older drivers lack it, what they say.
PARAMETERS = [
    ("--block-size", "4096", "queue/logical_block_size", "4096", None),
    ("--physical-block-size", "8192", "queue/physical_block_size", "8192", None),
    ("--io-min", "16K", "queue/minimum_io_size", "16384", None),
    ("--io-opt", "64K", "queue/optimal_io_size", "65536", None),
    ("--max-io", "128K", "queue/max_hw_sectors_kb", "128", None),
    ("--chunk-size", "64K", "queue/chunk_sectors", "128", None),
    ("--virt-boundary", "4096", "queue/virt_boundary_mask", "4095", None),
    ("--discard-granularity", "8192", "queue/discard_granularity", "8192", None),
    ("--max-discard", "1M", "queue/discard_max_hw_bytes", "1048576", None),
    ("--max-write-zeroes", "1M", "queue/write_zeroes_max_bytes", "1048576", None),
    ("--dma-alignment", "512", "queue/dma_alignment", "511", "DMA alignment"),
    ("--max-segments", "7", "queue/max_segments", "7", "limits of segments"),
    ("--max-segment-size", "8192", "queue/max_segment_size", "8192", "limits of segments"),
]


@pytest.mark.parametrize(
    ("option", "value", "attribute", "expected", "newer"), PARAMETERS, ids=[row[0] for row in PARAMETERS]
)
def test_a_limit_reaches_the_kernel(
    option: str, value: str, attribute: str, expected: str, newer: str | None, native: Face
) -> None:
    words = ["-t", "null", option, value]
    # They came with the same kernel as registered buffers; the bundled driver has them everywhere.
    if newer and not has("UPDATE_SIZE"):
        refused = native.run("add", *words, check=False)
        assert refused.status == 1, str(refused)
        assert newer in refused.err, str(refused)
        assert "6.15" in refused.err, str(refused)
        assert native.list() == []
        return
    path = native.add(*words)
    assert sysfs.attribute(path, attribute) == expected
    native.run("del", "-n", str(device_id(path)))


@pytest.mark.skipif(not has("UPDATE_SIZE"), reason="the driver has no limits of segments")
def test_a_segment_boundary_is_kept(native: Face) -> None:
    path = native.add("-t", "null", "--segment-boundary", "64K", "--max-segment-size", "64K")
    # There is no file for it in sysfs; the driver tells it back.
    assert native.info(path)["segments"] == {"boundary_mask": 65535, "max_size": 65536, "max_count": 0}
    native.run("del", "-n", str(device_id(path)))


@pytest.mark.short
@pytest.mark.parametrize(
    ("words", "attribute", "expected"),
    [
        ([], "queue/write_cache", "write back"),
        (["--no-write-cache"], "queue/write_cache", "write through"),
        ([], "queue/fua", "1"),
        (["--no-fua"], "queue/fua", "0"),
        (["--rotational"], "queue/rotational", "1"),
        (["--read-only"], "ro", "1"),
        (["--max-discard", "0"], "queue/discard_max_bytes", "0"),
        (["--max-write-zeroes", "0"], "queue/write_zeroes_max_bytes", "0"),
    ],
    ids=str,
)
def test_an_attribute_can_be_switched(words: list[str], attribute: str, expected: str, native: Face) -> None:
    path = native.add("-t", "null", *words)
    assert sysfs.attribute(path, attribute) == expected
    native.run("del", "-n", str(device_id(path)))


def test_partitions_are_looked_for_only_on_wish(native: Face, scratch: Path) -> None:
    file = image(scratch, 16 << 20)
    run(["sfdisk", "-q", file], input="start=2048, size=8192\n")
    path = native.add("-t", "file", "-f", file)
    assert Path(path + "p1").exists()
    native.run("del", "-n", str(device_id(path)))
    words = ["-t", "file", "-f", file, "--no-partition-scan"]
    if not has("NO_AUTO_PART_SCAN"):
        refused = native.run("add", *words, check=False)
        assert refused.status == 1, str(refused)
        assert "7.0" in refused.err, str(refused)
        return
    path = native.add(*words)
    assert not Path(path + "p1").exists()
    run(["blockdev", "--rereadpt", path])
    assert Path(path + "p1").exists()
    native.run("del", "-n", str(device_id(path)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chunk-size", "3000"], "chunk size"),
        (["--dma-alignment", "3"], "DMA alignment"),
        (["--virt-boundary", "256"], "virt boundary"),
        (["--max-segment-size", "512"], "longest segment"),
        (["--segment-boundary", "1000"], "segment boundary"),
        (["--io-min", "1000"], "io_min"),
        (["--discard-granularity", "1000"], "discard granularity"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_impossible_limit_is_named(words: list[str], message: str, native: Face) -> None:
    refused = native.run("add", "-t", "null", *words, check=False)
    assert refused.status == 1, str(refused)
    assert message in refused.err, str(refused)
    assert native.list() == []
