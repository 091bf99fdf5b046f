# SPDX-License-Identifier: MIT OR Apache-2.0
"""`ublk run --reload`: the source of a mounted, busy disk changes."""

import os
import signal
from pathlib import Path

import pytest
from support import fio, sysfs
from support.blockio import Disk
from support.command import run
from support.features import has
from support.server import Child
from support.waiting import until

# How often the source changes in one test; more by hand.
ROUNDS = int(os.environ.get("UBLK_ROUNDS", "3"))
SOURCE = """
import ublk

class Disk(ublk.BlockDevice):
    def __init__(self, size):
        super().__init__(size=size)
        self.data = bytearray(size)

    def read(self, offset, buf):
        buf[:] = self.data[offset : offset + len(buf)]

    def write(self, offset, buf):
        self.data[offset : offset + len(buf)] = buf
"""

needs_quiesce = pytest.mark.skipif(not has("QUIESCE"), reason="QUIESCE_DEV came with Linux 6.16")


def serve(python, file: Path, *more: str) -> Child:
    return Child([*python.argv, "run", "--reload", f"{file}:Disk", "--size", "32M", "-q", "2", *more])


def wait_until_told(server: Child, words: str, times: int = 1) -> None:
    until(lambda: server.log.count(words) == times, f"{times} times {words!r}", 20)


@pytest.mark.long
@needs_quiesce
@pytest.mark.time_limit(150 + ROUNDS * 20)
@pytest.mark.parametrize("style", ["plain", "workers", "tasks"])
def test_a_mounted_busy_disk_gets_new_code_without_a_failure(style: str, python, tmp_path: Path) -> None:
    source = SOURCE.replace("    def read", "    async def read") if style == "tasks" else SOURCE
    file, mount = tmp_path / "livedisk.py", tmp_path / "mnt"
    file.write_text(source)
    mount.mkdir()
    with serve(python, file, *(["--workers", "4"] if style == "workers" else [])) as server:
        path = server.line()
        run(["mkfs.ext4", "-q", path])
        run(["mount", path, mount])
        try:
            with fio.Steady(path, mount, blocks=2048, seconds=10 + ROUNDS * 5) as load:
                for turn in range(ROUNDS):
                    load.wait_until_busy(sysfs.requests(path) + 20)
                    file.write_text(source + f"# {turn}\n")
                    wait_until_told(server, "is now served by the new code", turn + 1)
                assert load.wait(120 + ROUNDS * 10) == 0, server.log
        finally:
            run(["umount", mount])
        run(["e2fsck", "-f", "-n", path])
        server.signal(signal.SIGINT)
        assert server.wait() in (0, 130), server.log
        assert "Traceback" not in server.log


@needs_quiesce
def test_code_that_does_not_work_is_told_and_changes_nothing(python, tmp_path: Path) -> None:
    file = tmp_path / "livedisk.py"
    file.write_text(SOURCE)
    with serve(python, file) as server:
        path = server.line()
        with Disk(path, direct=True) as disk:
            disk.write(4096, b"\x5a" * 4096)
            for turn, broken in enumerate(["class Disk(", "1 / 0", SOURCE.replace("def write", "def wrote")]):
                file.write_text(broken)
                wait_until_told(server, "the old code continues to serve", turn + 1)
                assert disk.read(4096, 4096) == b"\x5a" * 4096
            file.write_text(SOURCE.replace("buf[:] = self.data[", "buf[:] = b'\\x33' * len(buf); self.data["))
            wait_until_told(server, "is now served by the new code")
            assert disk.read(4096, 4096) == b"\x33" * 4096
        server.signal(signal.SIGTERM)
        assert server.wait() in (0, 143), server.log
        assert not os.path.exists(path)


@pytest.mark.long
@needs_quiesce
def test_a_command_runs_on_while_the_code_changes(python, tmp_path: Path) -> None:
    file = tmp_path / "livedisk.py"
    file.write_text(SOURCE)
    change = f"echo '# new' >> {file}; for i in $(seq 60); do dd if=$UBLK_DEV of=/dev/null bs=64k count=4 iflag=direct"
    with serve(python, file, "--", "sh", "-c", f"{change} 2>/dev/null || exit 9; sleep 0.1; done; exit 7") as server:
        assert server.wait(60) == 7, server.log
        assert server.log.count("is now served by the new code") == 1, server.log


@pytest.mark.skipif(has("QUIESCE"), reason="this driver has it")
def test_an_older_driver_is_named_as_the_reason(python, tmp_path: Path) -> None:
    file = tmp_path / "livedisk.py"
    file.write_text(SOURCE)
    with serve(python, file) as server:
        assert server.wait() == 1
        assert "6.16" in server.log
