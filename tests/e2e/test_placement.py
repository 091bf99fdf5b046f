# SPDX-License-Identifier: MIT OR Apache-2.0
"""On which CPUs queues are served."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import fio, sysfs
from support.backends import image
from support.blockio import Disk
from support.face import Face, device_id
from support.processes import threads


def queue_threads(pid: int) -> dict[str, set[int]]:
    """The CPUs that each thread which serves queues may use, by its name."""
    found = {}
    for thread in threads(pid):
        name = Path(f"/proc/{pid}/task/{thread}/comm").read_text().strip()
        if name.startswith("ublk") and "q" in name:
            found[name] = os.sched_getaffinity(thread)
    return found


@pytest.fixture
def two_cpus() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs")


@pytest.mark.short
def test_queues_are_served_where_their_requests_come_from(native_disk, native: Face, two_cpus) -> None:
    path = native_disk("-t", "mem", "--size", "16M", "-q", "2", "--cpus", "auto")
    queues = sysfs.queue_cpus(path)
    assert len(queues) == 2
    assert not queues[0] & queues[1]
    number = device_id(path)
    assert queue_threads(native.info(path)["pid"]) == {
        f"ublk{number}q{n}": cpus & os.sched_getaffinity(0) for n, cpus in enumerate(queues)
    }
    fio.verify(path, size="4m", bs="4k", iodepth=16)


def test_a_thread_of_several_queues_may_use_the_cpus_of_all(native_disk, native: Face, two_cpus) -> None:
    path = native_disk("-t", "null", "-q", "2", "--cpus", "auto", "--threads", "1")
    everywhere = set().union(*sysfs.queue_cpus(path)) & os.sched_getaffinity(0)
    assert list(queue_threads(native.info(path)["pid"]).values()) == [everywhere]


def test_all_queues_can_be_kept_on_chosen_cpus(native_disk, native: Face, two_cpus) -> None:
    path = native_disk("-t", "null", "-q", "2", "--cpus", "1")
    assert list(queue_threads(native.info(path)["pid"]).values()) == [{1}, {1}]


@pytest.mark.parametrize("words", [[], ["--cpus", "off"]], ids=str)
def test_without_a_wish_the_scheduler_decides(words: list[str], native_disk, native: Face) -> None:
    path = native_disk("-t", "null", *words)
    assert list(queue_threads(native.info(path)["pid"]).values()) == [os.sched_getaffinity(0)]


@pytest.mark.parametrize(
    ("cpus", "status", "says"),
    [("900", 1, "CPUs = 900: this process may use 0"), ("x", 2, "0-3,8"), ("3-1", 2, "ends before it begins")],
)
def test_cpus_that_cannot_be_are_refused(cpus: str, status: int, says: str, native: Face) -> None:
    refused = native.run("add", "-t", "null", "--cpus", cpus, check=False)
    assert refused.status == status, str(refused)
    assert says in refused.err, str(refused)
    assert native.list() == []


def test_a_recovered_device_is_served_on_the_same_cpus(native: Face, two_cpus) -> None:
    path = native.add("-t", "null", "--cpus", "1", "--recovery")
    number = str(device_id(path))
    first = native.info(path)["pid"]
    native.run("upgrade", "-n", number) if "QUIESCE" in native.info(path)["features"] else _replace(native, path)
    second = native.info(path)["pid"]
    assert second != first
    assert list(queue_threads(second).values()) == [{1}]
    native.run("del", "-n", number)


@pytest.mark.io_errors
@pytest.mark.time_limit(150)
def test_a_disk_whose_cpu_goes_offline_gets_a_server_elsewhere(native: Face, two_cpus, scratch: Path) -> None:
    path = native.add("-t", "file", "-f", image(scratch, 16 << 20), "--cpus", "1", "--recovery")
    number = str(device_id(path))
    online = Path("/sys/devices/system/cpu/cpu1/online")
    online.write_text("0")
    try:
        if "QUIESCE" in native.info(path)["features"]:
            taken = native.run("upgrade", "-n", number)
            assert "CPUs 1 are offline" in taken.err, str(taken)
        os.kill(native.info(path)["pid"], 9)
        taken = native.run("recover", "-n", number, timeout=90)
        assert "CPUs 1 are offline" in taken.err, str(taken)
        with Disk(path, direct=True) as disk:
            disk.write(0, bytes(4096))
    finally:
        online.write_text("1")
    native.run("del", "-n", number)


def pages_by_node(pid: int) -> dict[int, int]:
    """How many pages of anonymous memory each NUMA node has, in mappings that are large."""
    found: dict[int, int] = {}
    for line in Path(f"/proc/{pid}/numa_maps").read_text().splitlines():
        words = dict(word.split("=", 1) for word in line.split() if "=" in word)
        nodes = {int(key[1:]): int(value) for key, value in words.items() if re.fullmatch(r"N\d+", key)}
        if "file" not in words and sum(nodes.values()) >= 64:
            found = {node: found.get(node, 0) + nodes.get(node, 0) for node in found | nodes}
    return found


@pytest.fixture
def small_pages() -> Iterator[None]:
    """No huge pages: then as much memory is in use as was touched."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    words = setting.read_text()
    setting.write_text("never")
    yield
    setting.write_text(re.findall(r"\[(\w+)\]", words)[0])


@pytest.mark.skipif(not Path("/sys/devices/system/node/node1").exists(), reason="needs two NUMA nodes")
def test_buffers_lie_on_the_node_of_their_queue(native_disk, native: Face, two_cpus, small_pages) -> None:
    path = native_disk("-t", "null", "-q", "2", "-d", "64", "--max-io", "64K", "--data", "copy", "--cpus", "auto")
    before = os.sched_getaffinity(0)
    with Disk(path, direct=True) as disk:
        # A request at a time goes round the tags. That of the second queue touches a quarter of each buffer.
        for cpu, kib in ((0, 64), (1, 16)):
            os.sched_setaffinity(0, {cpu})
            for _ in range(128):
                disk.write(0, bytes(kib << 10))
        os.sched_setaffinity(0, before)
    pages = pages_by_node(native.info(path)["pid"])
    assert pages[0] >= 3 * pages[1] > 0, pages


def _replace(native: Face, path: str) -> None:
    os.kill(native.info(path)["pid"], 9)
    native.run("recover", "-n", str(device_id(path)), timeout=90)
