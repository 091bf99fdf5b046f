# SPDX-License-Identifier: MIT OR Apache-2.0

"""The README's Python, run as it stands."""

import asyncio
import re
import threading
from pathlib import Path

import pytest

import ublk
from ublk import testing

ROOT = Path(__file__).parents[2]


def blocks(path):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / path).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def served(monkeypatch, driver):
    """Devices are made on the stand-in driver, read once, and then stopped by somebody."""
    served = []
    start, start_async = ublk.BlockDevice.start, ublk.BlockDevice.start_async

    def client(device):
        device.wait_ready()
        served.append((type(device._target).__name__, driver.read(device.id, 0, 512)))
        device.stop()

    def started(self, **options):
        if "_driver" in options:
            return start(self, **options)
        if "recoverable" in options:
            return start(self, **options, _driver=driver)
        device = start(self, **options, _driver=driver)
        threading.Thread(target=client, args=[device]).start()
        return device

    async def started_async(self, **options):
        device = await start_async(self, **options, _driver=driver)
        threading.Thread(target=client, args=[device]).start()
        return device

    monkeypatch.setattr(ublk.BlockDevice, "start", started)
    monkeypatch.setattr(ublk.BlockDevice, "start_async", started_async)
    return served


def test_the_code_of_the_readme_runs(served, monkeypatch, driver, tmp_path):
    recover = ublk.recover
    monkeypatch.setattr(ublk, "recover", lambda *arguments: recover(*arguments, _driver=driver))
    names = {"__name__": "readme"}
    for block in blocks("README.md"):
        exec(compile(block, "README.md", "exec"), names)
    assert served == [(name, bytes(512)) for name in ("RamDisk", "RamDisk", "RamDisk", "BlockDevice")]
    served.clear()
    asyncio.run(names["main"]())
    with names["Sorted"](size=1 << 20).start() as device:
        device.wait()
    (tmp_path / "half").write_bytes(b"x" * (512 << 10))
    half = names["Half"](tmp_path / "half")
    with half.file, testing.open(half) as file:
        assert file.pread((512 << 10) - 512, 1024) == b"x" * 512 + bytes(512)
        file.pwrite(0, b"y")
        with pytest.raises(OSError, match="No space"):
            file.pwrite(512 << 10, bytes(512))
    assert (tmp_path / "half").read_bytes()[:2] == b"yx"
    assert served == [("Remote", bytes(512)), ("Sorted", bytes(512))]


def test_the_code_of_the_packages_readme_runs():
    names = {"__name__": "readme"}
    for block in blocks("ublk-py/README.md"):
        exec(compile(block, "README.md", "exec"), names)
    with testing.open(names["RamDisk"](1 << 20)) as file:
        file.pwrite(512, b"x" * 512)
        assert file.pread(0, 1024) == bytes(512) + b"x" * 512
