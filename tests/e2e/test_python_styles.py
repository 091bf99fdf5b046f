# SPDX-License-Identifier: MIT OR Apache-2.0
"""Pools of threads, event loops, batches, requests that the program takes: the same disk in every style."""

import hashlib
import os
import signal
import sys
from pathlib import Path

import pytest
from support import fio
from support.blockio import Disk, Tasks
from support.command import run
from support.model import Model, exercise
from support.server import Child, Server
from support.waiting import until

EXAMPLES = Path("/opt/ublk/examples")
STYLES = {
    "workers": ("Ram", {"workers": 8}),
    "tasks": ("TaskRam", {}),
    "batches": ("BatchRam", {}),
    "pull": ("PullRam", {}),
}
every_style = pytest.mark.parametrize("style", STYLES)


def serve(style: str, **options) -> Server:
    disk, more = STYLES[style]
    return Server(disk, **more, **options)


@pytest.mark.short
@every_style
def test_data_is_whole(style: str) -> None:
    with serve(style, queues=2, depth=32) as server:
        fio.verify(server.path, bs="4k", iodepth=32, size=2 << 20)
        with Disk(server.path, direct=True) as disk:
            model = Model(8 << 20)
            model.data[:] = disk.read(0, 8 << 20)
            exercise(disk, model, unit=512, longest=1 << 18, steps=60, seed=5, zeroing=True)
            model.check(disk)
            assert server.ask("disk.digest()") == hashlib.sha256(model.data).hexdigest()


@pytest.mark.long
@every_style
def test_a_file_system_lives_on_it(style: str, tmp_path: Path) -> None:
    with serve(style, queues=2, size=32 << 20) as server:
        run(["mkfs.ext4", "-q", server.path])
        run(["mount", "-o", "discard", server.path, tmp_path])
        try:
            data = os.urandom(4 << 20)
            (tmp_path / "file").write_bytes(data)
            run(["sync"])
            Path("/proc/sys/vm/drop_caches").write_text("3")
            assert (tmp_path / "file").read_bytes() == data
            (tmp_path / "file").unlink()
            run(["fstrim", tmp_path])
        finally:
            run(["umount", tmp_path])
        run(["e2fsck", "-fn", server.path])


@pytest.mark.long
@pytest.mark.io_errors
@every_style
def test_ctrl_c_and_kill_in_the_middle_of_io_hang_nobody(style: str, native) -> None:
    for number in (signal.SIGINT, signal.SIGKILL):
        with serve(style, queues=2) as server:
            with fio.Load(server.path, numjobs=2) as load:
                load.wait_until_busy()
                server.kill(number)
                load.wait(20)
            if number == signal.SIGKILL:
                until(lambda: all(device["state"] == "DEAD" for device in native.list()), "the state DEAD", 45)
                native.run("del", "--dead")
            assert native.list() == []


@pytest.mark.parametrize(("disk", "workers"), [("Meeting", 64), ("TaskMeeting", None)])
def test_handlers_that_wait_overlap_up_to_the_queue_depth(disk: str, workers: int | None) -> None:
    with Server(disk, depth=64, workers=workers) as server, Disk(server.path, direct=True) as device:
        server.ask("disk.expect(64)")
        tasks = Tasks()
        for thread in range(64):
            tasks.start(lambda at=thread: device.read(at * 8192, 4096))
        tasks.join(45)


def test_requests_of_a_wake_up_come_at_once() -> None:
    with Server("BatchRam", depth=64) as server:
        fio.verify(server.path, bs="4k", iodepth=64, size=2 << 20)
        assert server.ask("disk.most") > 1


@pytest.mark.short
# A client that reads the disk while its program ends gets an error.
@pytest.mark.io_errors
@pytest.mark.parametrize("example", ["pull.py", "tasks.py"])
def test_an_example_program_serves_until_ctrl_c(example: str) -> None:
    with Child([sys.executable, "-u", str(EXAMPLES / example)]) as server:
        path = server.line()
        until(lambda: os.path.exists(path), "the node")
        with Disk(path, direct=True) as disk:
            disk.write(8192, b"\x42" * 4096)
            assert disk.read(4096, 8192) == bytes(4096) + b"\x42" * 4096
        server.signal(signal.SIGINT)
        assert server.wait() in (0, 130), server.log
        assert not os.path.exists(path)


@pytest.mark.long
@pytest.mark.parametrize(
    ("example", "more"),
    [
        ("thread_pool.py:Slow", ["--workers", "32"]),
        ("batches.py:Batches", []),
        ("compressed.py:Compressed", []),
        ("numpy_disk.py:Flipped", ["-q", "2"]),
    ],
)
def test_an_example_class_keeps_data(example: str, more: list[str], python) -> None:
    with Child([*python.argv, "run", str(EXAMPLES / example), "--size", "16M", *more]) as server:
        path = server.line()
        fio.verify(path, size="2m", bs="4k", iodepth=32)
        server.signal(signal.SIGINT)
        assert server.wait() in (0, 130), server.log
