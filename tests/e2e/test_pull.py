# SPDX-License-Identifier: MIT OR Apache-2.0
"""The examples of the pull interface: requests that are fetched, and ended from anywhere."""

import subprocess

import pytest
from support import fio
from support.blockio import Disk
from support.face import Face, device_id
from support.model import Model, exercise
from support.server import Child
from support.waiting import until


@pytest.mark.short
def test_a_pool_of_threads_serves_a_disk(native: Face) -> None:
    with Child(["pull_threads"]) as server:
        path = server.line()
        with Disk(path, direct=True) as disk:
            exercise(disk, Model(8 << 20), unit=512, longest=256 << 10, steps=100, seed=70)
        fio.verify(path, size="8m", bs="4k", iodepth=32)
        native.run("del", "-n", str(device_id(path)))
        assert server.wait() == 0, server.log


def test_tasks_of_tokio_wait_at_the_same_time(native: Face) -> None:
    with Child(["pull_tokio"]) as server:
        path = server.line()
        rates = {}
        for depth in (1, 64):
            job = fio.measure(path, rw="randread", bs="4k", iodepth=depth, time_based=1, runtime=4)
            rates[depth] = job["read"]["iops"]
        # Each takes 10 ms: one after the other there cannot be more than a hundred a second, however slow the machine.
        assert rates[1] <= 100 < rates[64]
        native.run("del", "-n", str(device_id(path)))
        assert server.wait() == 0, server.log


@pytest.mark.io_errors
def test_a_killed_pull_server_hangs_nobody(native: Face) -> None:
    with Child(["pull_threads"]) as server:
        path = server.line()
        with Disk(path, direct=True) as disk:
            disk.write(0, bytes(4096))
        server.process.kill()
        assert server.wait() != 0
    until(lambda: native.list()[0]["state"] == "DEAD", "the state DEAD")
    native.run("del", "--dead")
    assert subprocess.run(["test", "-e", path], check=False).returncode == 1
