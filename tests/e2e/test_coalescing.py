# SPDX-License-Identifier: MIT OR Apache-2.0
"""Requests that gather before the server looks for them."""

from pathlib import Path

import pytest
from support import fio
from support.backends import image
from support.blockio import SECTOR, Disk
from support.face import Face, device_id
from support.gate import wait_behind
from support.server import Server


@pytest.mark.short
@pytest.mark.parametrize("kind", ["mem", "file"])
def test_data_is_right_where_requests_gather(native: Face, scratch: Path, kind: str) -> None:
    what = ["--size", "16M"] if kind == "mem" else ["-f", image(scratch, 16 << 20)]
    path = native.add("-t", kind, *what, "--coalesce-usecs", "200")
    fio.verify(path, size="8m", bs="4k", iodepth=32)
    native.run("del", "-n", str(device_id(path)))


@pytest.mark.short
def test_python_is_entered_for_several_requests_at_once_where_they_gather() -> None:
    with Server("Blocking", coalesce_usecs=10_000) as server, Disk(server.path, direct=True) as disk:
        tasks = wait_behind(server, disk, 16 * [lambda offset: [disk.read(offset, SECTOR) for _ in range(20)]])
        before = server.ask("[dev.stats().entries, dev.stats().requests]")
        server.ask("disk.gate.set()")
        tasks.join()
        entries, requests = server.ask("[dev.stats().entries, dev.stats().requests]")
        assert requests - before[1] >= 320
        assert 2 * (entries - before[0]) <= requests - before[1]


def test_requests_cannot_gather_for_long(native: Face) -> None:
    result = native.run("add", "-t", "null", "--coalesce-usecs", "10001", check=False)
    assert result.status == 1
    assert "10000 µs at most" in result.err
