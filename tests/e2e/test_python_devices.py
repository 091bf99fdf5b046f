# SPDX-License-Identifier: MIT OR Apache-2.0
"""Queues, and several devices in one process."""

import os

import pytest
from support import fio, sysfs
from support.blockio import Disk, together
from support.face import Face
from support.model import Model, exercise
from support.server import Server


@pytest.mark.short
def test_two_queues_are_served_by_two_threads_from_both_cpus() -> None:
    with Server("Ram", queues=2) as server, Disk(server.path, direct=True) as disk:
        queues = sysfs.queue_cpus(server.path)
        assert len(queues) == 2, queues

        def read() -> None:
            for index in range(40):
                disk.read(index * 4096, 4096)

        seen = []
        for cpus in queues:
            server.ask("disk.forget()")
            together([read], cpus=[min(cpus)])
            seen.append(server.ask("disk.requests_of"))
        # Each CPU's requests went to one thread, and not to the same.
        threads = [max(requests, key=requests.get) for requests in seen]
        assert threads[0] != threads[1], seen
        for requests, thread in zip(seen, threads, strict=True):
            assert requests[thread] >= 40, seen


def test_queues_are_limited_to_the_cpus() -> None:
    with Server("Ram", queues=64) as server:
        assert server.ask("dev.queues") == os.cpu_count() == len(sysfs.queue_cpus(server.path))


def test_handlers_run_in_threads_that_python_knows() -> None:
    with Server("Ram", queues=2) as server, Disk(server.path, direct=True) as disk:
        disk.read(0, 4096)
        known = server.ask("[thread.native_id for thread in __import__('threading').enumerate()]")
        assert set(server.ask("list(disk.threads)")) <= set(known)


@pytest.mark.long
def test_many_devices_live_in_one_process(native: Face) -> None:
    count = 12
    with Server("Ram", size=1 << 20, count=count) as server:
        assert len(set(server.paths)) == count
        assert {device["pid"] for device in native.list()} == {server.pid}

        def work(index: int) -> None:
            with Disk(server.paths[index], direct=True) as disk:
                exercise(disk, Model(1 << 20), unit=512, longest=65536, steps=30, seed=60 + index)

        together([lambda index=index: work(index) for index in range(count)], seconds=50)
        # One of them ends; the others do not notice.
        server.ask("devs[3].stop()")
        assert not os.path.exists(server.paths[3])
        with Disk(server.paths[4], direct=True) as disk:
            assert len(disk.read(0, 4096)) == 4096


def test_parallel_load_on_two_queues_is_verified() -> None:
    with Server("Ram", queues=2) as server:
        job = fio.verify(server.path, bs="4k", iodepth=32, size=4 << 20, numjobs=1)
        assert job["read"]["io_bytes"] == 4 << 20


def test_features_and_devices_are_told(native: Face) -> None:
    with Server("Ram", size=1 << 20, depth=9) as server:
        features = server.ask("ublk.features()")
        assert features["CMD_IOCTL_ENCODE"] is True or features["UBLK_F_CMD_IOCTL_ENCODE"] is True, features
        infos = server.ask(
            "[{k: getattr(i, k) for k in ('id', 'path', 'state', 'pid', 'depth')} for i in ublk.devices()]"
        )
        assert infos == [{"id": 0, "path": server.path, "state": "LIVE", "pid": server.pid, "depth": 9}]
        assert [device["path"] for device in native.list()] == [server.path]
