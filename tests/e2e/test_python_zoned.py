# SPDX-License-Identifier: MIT OR Apache-2.0
"""Zoned disks in Python."""

import errno
import signal
from pathlib import Path

import pytest
from support import fio, sysfs
from support.blockio import Disk, error_of
from support.command import run
from support.features import has
from support.server import Child
from support.zones import keep_files, report

pytestmark = pytest.mark.skipif(not has("ZONED"), reason="zones came with Linux 6.6")
ZONE = 4 << 20
EXAMPLE = "/opt/ublk/examples/zoned.py:ZonedRam"
WRONG = """
import ublk

class Wrong(ublk.BlockDevice):
    def __init__(self, size):
        super().__init__(size=size, block_size=4096, zone_size=4 << 20)

    def report_zones(self, offset, count):
        starts = range(offset, self.size, self.zone_size)[:count]
        return [ublk.Zone(start, self.zone_size, 0, ublk.ZoneCondition.EMPTY) for start in starts]

    def zone_reset(self, offset): ...

    def read(self, offset, buf): ...
"""


@pytest.fixture(params=[[], ["--workers", "4"]], ids=["queues", "workers"])
def path(request: pytest.FixtureRequest, python):
    with Child([*python.argv, "run", EXAMPLE, "--size", "64M", "-q", "2", *request.param]) as server:
        yield server.line()
        server.signal(signal.SIGINT)
        assert server.wait() in (0, 130), server.log
        assert "Traceback" not in server.log


@pytest.mark.short
@pytest.mark.io_errors
def test_zones_are_written_opened_closed_finished_and_reset(path: str) -> None:
    assert sysfs.attribute(path, "queue/zoned") == "host-managed"
    assert sysfs.number(path, "queue/nr_zones") == 16
    with Disk(path, direct=True) as disk:
        disk.write(ZONE, b"a" * 8192)
        assert disk.read(ZONE, 8192) == b"a" * 8192
        assert int(report(path)[1]["wptr"], 16) * 512 == 8192
        assert error_of(lambda: disk.write(2 * ZONE + 4096, bytes(4096))) == errno.EIO
    second = ["-o", str(2 * ZONE // 512), "-c", "1", path]
    for command, condition in (("open", "oe"), ("close", "em"), ("finish", "fu"), ("reset", "em")):
        run(["blkzone", command, *second])
        assert report(path)[2]["name"] == condition
    run(["blkzone", "reset", path])
    assert {zone["name"] for zone in report(path)} == {"em"}
    inside = run(["blkzone", "report", "-o", str(ZONE // 512 + 8), "-c", "1", path]).out
    assert f"start: {ZONE // 512:#011x}" in inside


@pytest.mark.long
def test_fio_writes_and_verifies_zones(path: str) -> None:
    fio.verify(path, rw="write", zonemode="zbd", bs="64k", iodepth=8, size=f"{4 * ZONE}", max_open_zones=4)
    fio.measure(path, rw="randwrite", zonemode="zbd", bs="16k", iodepth=8, size=f"{4 * ZONE}", max_open_zones=4)


@pytest.mark.time_limit(180)
def test_a_file_system_that_appends_lives_on_them(python, tmp_path: Path) -> None:
    with Child([*python.argv, "run", EXAMPLE, "--size", "512M", "-q", "2"]) as server:
        path = server.line()
        keep_files(path, tmp_path)
        server.signal(signal.SIGINT)
        assert server.wait() in (0, 130), server.log
        assert "Traceback" not in server.log


@pytest.mark.short
@pytest.mark.io_errors
def test_zones_that_cannot_be_are_named_before_there_is_a_disk(python, tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    with Child([*python.argv, "run", f"{tmp_path}/wrong.py:Wrong", "--size", "16M"]) as server:
        assert server.wait() not in (0, None)
        assert "the write pointer 0 is not in the zone at 4194304" in server.log
