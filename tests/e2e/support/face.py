# SPDX-License-Identifier: MIT OR Apache-2.0
"""The `ublk` command in its two forms."""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from . import udev
from .command import Result, run


class Face:
    """One of the two programs that accept the same commands."""

    def __init__(self, name: str, argv: Sequence[str]) -> None:
        self.name = name
        self.argv = tuple(argv)

    def __repr__(self) -> str:
        return self.name

    def run(self, *words: str | os.PathLike, **options: Any) -> Result:
        return run([*self.argv, *words], **options)

    def add(self, *words: str | os.PathLike, settle: bool = True, **options: Any) -> str:
        """Adds a device and returns its path, the only thing that `add` prints. By default udev's own
        reads are over then: they must not get between a test and its disk."""
        since = udev.now()
        result = self.run("add", *words, **options)
        lines = result.out.splitlines()
        assert len(lines) == 1, str(result)
        assert lines[0].startswith("/dev/ublkb"), str(result)
        assert result.out.endswith("\n"), str(result)
        if settle:
            udev.wait_until_seen(lines[0], since)
        return lines[0]

    def list(self, *words: str) -> list[dict[str, Any]]:
        result = self.run("list", "--json", *words)
        devices = json.loads(result.out)
        assert isinstance(devices, list), str(result)
        return devices

    def info(self, path: str) -> dict[str, Any]:
        """The list's entry of one device."""
        found = [device for device in self.list() if device["path"] == path]
        assert len(found) == 1, f"{path} is {len(found)} times in {self.list()}"
        return found[0]


NATIVE = Face("native", ["ublk"])
PYTHON = Face("python", [sys.executable, "-m", "ublk"])


def device_id(path: str) -> int:
    """The number in /dev/ublkbN."""
    return int(path.removeprefix("/dev/ublkb"))
