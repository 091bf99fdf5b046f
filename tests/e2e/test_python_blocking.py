# SPDX-License-Identifier: MIT OR Apache-2.0
"""Handlers that take their time, and how many requests wait meanwhile."""

import os
import time

import pytest
from support import kernel, sysfs
from support.blockio import SECTOR, Disk, Tasks
from support.gate import GATE, wait_behind
from support.pace import patience
from support.processes import is_blocked
from support.server import Server
from support.waiting import until

SLOW = 1200 * SECTOR


def test_a_handler_may_block_for_two_seconds() -> None:
    with Server("Blocking") as server, Disk(server.path, direct=True) as disk:
        disk.write(SLOW, b"\x10" * SECTOR)
        started = time.monotonic()
        assert disk.read(SLOW, SECTOR) == b"\x10" * SECTOR
        assert 1.9 <= time.monotonic() - started < patience(6)
        # The others go on afterwards.
        started = time.monotonic()
        for sector in range(8):
            disk.read(sector * SECTOR, SECTOR)
        assert time.monotonic() - started < patience(1.5)


@pytest.mark.short
@pytest.mark.skipif(not kernel.KEEPS_ORDER, reason="requests that wait together arrive in reverse order")
def test_what_was_finished_before_a_slow_handler_in_the_same_batch_is_not_held_up() -> None:
    with Server("Blocking") as server, Disk(server.path, direct=True) as disk:
        ended: dict[int, float] = {}

        def read(offset: int) -> None:
            disk.read(offset, SECTOR)
            ended[offset] = time.monotonic()

        tasks = Tasks()
        tasks.start(read, GATE)
        assert server.ask("disk.waiting.wait(10)") is True
        # While the queue is busy these two arrive, in this order: one batch for the next round.
        for offset in 0, SLOW:
            thread = tasks.start(read, offset)
            until(lambda waiting=thread: is_blocked(os.getpid(), waiting.native_id), f"the reader of {offset} blocked")
        # Requests are submitted one by one behind a handler that took 5 ms or more.
        time.sleep(0.02)
        opened = time.monotonic()
        server.ask("disk.gate.set()")
        tasks.join()
        assert ended[SLOW] - opened >= 1.9
        assert ended[SLOW] - ended[0] >= 1.0, "a finished request waited for its slow neighbour"


@pytest.mark.short
def test_python_is_entered_once_for_all_requests_that_wait_together() -> None:
    with Server("Blocking", depth=64) as server, Disk(server.path, direct=True) as disk:
        tasks = wait_behind(server, disk, 32 * [lambda offset: disk.read(offset, SECTOR)])
        before = server.ask("[dev.stats().entries, dev.stats().requests]")
        server.ask("disk.gate.set()")
        tasks.join()
        entries, requests = server.ask("[dev.stats().entries, dev.stats().requests]")
        assert requests - before[1] >= 32
        # The ring may hand them over in a few portions.
        assert entries - before[0] <= 4


def test_a_blocked_queue_does_not_hold_up_the_other() -> None:
    with Server("Blocking", queues=2) as server, Disk(server.path, direct=True) as disk:
        first, second = (min(cpus) for cpus in sysfs.queue_cpus(server.path))
        blocked, free = Tasks(), Tasks()
        blocked.start(lambda: disk.read(GATE, SECTOR), cpu=first)
        assert server.ask("disk.waiting.wait(10)") is True
        free.start(lambda: [disk.read(0, SECTOR) for _ in range(20)], cpu=second)
        free.join(10)
        server.ask("disk.gate.set()")
        blocked.join()


@pytest.mark.parametrize("depth", [1, 4])
def test_as_many_requests_as_the_queue_is_deep_are_taken_at_once(depth: int) -> None:
    with Server("Blocking", depth=depth) as server, Disk(server.path, direct=True) as disk:
        tasks = Tasks()
        tasks.start(lambda: disk.read(GATE, SECTOR))
        assert server.ask("disk.waiting.wait(10)") is True
        for index in range(2 * depth):
            tasks.start(lambda at=index: disk.read((32 + 2 * at) * SECTOR, SECTOR))
        until(lambda: sysfs.in_flight(server.path) == depth, f"{depth} requests in flight")
        time.sleep(0.3)
        assert sysfs.in_flight(server.path) == depth
        server.ask("disk.gate.set()")
        tasks.join()
        # A reader may go on before the kernel has put its request away.
        until(lambda: sysfs.in_flight(server.path) == 0, "no request in flight")


def test_stop_waits_for_the_handler_that_runs() -> None:
    with Server("Blocking") as server:
        with Disk(server.path, direct=True) as disk:
            disk.write(SLOW, b"\x44" * SECTOR)
            results = []
            tasks = Tasks()
            tasks.start(lambda: results.append(disk.read(SLOW, SECTOR)))
            until(lambda: sysfs.in_flight(server.path) == 1, "a request in flight")
            started = time.monotonic()
            server.ask("dev.stop()")
            assert time.monotonic() - started < patience(10)
            tasks.join()
        assert results == [b"\x44" * SECTOR], "the request that ran was not finished"


def test_busy_threads_beside_the_handlers_do_not_starve_them() -> None:
    with Server("BusyBeside") as server, Disk(server.path, direct=True) as disk:
        started = time.monotonic()
        for index in range(50):
            disk.read(index * 4096, 4096)
        taken = time.monotonic() - started
        assert taken < patience(10), f"50 reads took {taken:.1f} s"
