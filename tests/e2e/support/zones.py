# SPDX-License-Identifier: MIT OR Apache-2.0
"""Zones as the kernel reports them, and a file system that lives on them."""

import os
import re
from pathlib import Path

from .command import run


def report(path: str) -> list[dict[str, str]]:
    """Each zone's write pointer, condition and type."""
    lines = run(["blkzone", "report", path]).out.splitlines()
    pattern = r"start: 0x\w+, .*wptr 0x(?P<wptr>\w+).*zcond: ?\d+\((?P<name>\w+)\) \[type: (?P<type>\d+)"
    return [match.groupdict() for line in lines if (match := re.search(pattern, line))]


def keep_files(path: str, directory: Path) -> None:
    """Makes a btrfs, which writes by zone append, and finds its files again after another mount."""
    run(["mkfs.btrfs", "-q", "-O", "zoned", "-d", "single", "-m", "single", path], timeout=60)
    run(["mount", path, directory])
    try:
        content = os.urandom(3 << 20)
        for n in range(4):
            (directory / f"file{n}").write_bytes(content)
        run(["sync"])
        run(["umount", directory])
        run(["mount", path, directory])
        assert all((directory / f"file{n}").read_bytes() == content for n in range(4))
    finally:
        run(["umount", directory])
