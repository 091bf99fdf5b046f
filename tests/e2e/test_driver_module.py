# SPDX-License-Identifier: MIT OR Apache-2.0
"""The driver's module at the end of its life: all that the tests made with it is gone."""

import os
from pathlib import Path

import pytest
from support import driver
from support.face import Face


def _number_of_devices() -> list[str]:
    return [line for line in Path("/proc/devices").read_text().splitlines() if line.split()[1:] == ["ublk-char"]]


@pytest.mark.short
@pytest.mark.last
@pytest.mark.time_limit(120)
def test_the_driver_can_be_removed_and_inserted_again(native: Face, python: Face) -> None:
    for face in (native, python):
        driver.unload()
        assert not driver.MODULE.exists()
        assert not os.path.exists("/sys/class/ublk-char")
        assert _number_of_devices() == []
        driver.load()
        assert len(_number_of_devices()) == 1
        assert face.list() == []
        path = face.add("-t", "null")
        with open(path, "rb", buffering=0) as disk:
            assert len(disk.read(4096)) == 4096
        face.run("del", "-a")
        assert not os.path.exists(path)
