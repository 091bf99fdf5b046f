# SPDX-License-Identifier: MIT OR Apache-2.0
"""`ublk bench` measures disks and leaves the machine as it was."""

import json
import os
import signal
from pathlib import Path

import pytest
from support import sysfs
from support.backends import image
from support.blockio import Disk
from support.command import Result, run
from support.face import NATIVE, Face, device_id
from support.features import has
from support.server import Child
from support.waiting import until

pytestmark = [pytest.mark.long, pytest.mark.time_limit(240)]

OWN = {"ublk-null", "ublk-mem", "ublk-file"}
QUICK = ("--seconds", "0.2", "--windows", "1")


def bench(face: Face, *words: str | os.PathLike, status: int = 0) -> Result:
    result = face.run("bench", *words, timeout=200, check=False)
    assert result.status == status, str(result)
    return result


def measured(result: Result) -> dict[str, dict]:
    """The results by disk and job."""
    return {disk["name"]: {job["job"]: job for job in disk["jobs"]} for disk in json.loads(result.out)["disks"]}


def files(directory: Path) -> list[Path]:
    return list(directory.glob("ublk-bench-*"))


@pytest.mark.short
def test_own_disks_are_measured_and_removed(face: Face, tmp_path: Path) -> None:
    own = OWN | ({"python-null"} if face.name == "python" else set())
    words = (*QUICK, "--size", "16M", "--directory", tmp_path, "--json", "-")
    result = bench(face, *words)
    disks = measured(result)
    assert own <= set(disks), str(result)
    jobs = {"randread-4k-qd1", "randread-4k-qd32", "randwrite-4k-qd32", "read-128k-qd32"}
    for name in own:
        assert set(disks[name]) == jobs
        for job in disks[name].values():
            (window,) = job["windows"]
            assert job["failed"] is None, job
            assert window["requests"] > 0
            assert window["seconds"] >= 0.2
            assert 0 < window["p50_us"] <= window["p99_us"] <= window["p999_us"]
            assert window["client_us"] > 0
            assert window["server_us"] > 0
            assert job["median"]["iops"] == window["iops"] > 0
    document = json.loads(result.out)
    assert document["conditions"]["driver"]["features"]
    assert all(document["absent"].values())
    assert not document["marks"]
    assert not set(disks) & set(document["absent"])
    # Devices, processes and loop devices that are left are found after the test.
    assert face.list() == []
    assert files(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_removes_what_was_created(native: Face, tmp_path: Path, number: signal.Signals) -> None:
    argv = [*native.argv, "bench", "--seconds", "300", "--size", "16M", "--directory", str(tmp_path)]
    with Child(argv) as child:
        until(lambda: "measuring ublk-null" in child.log, "the first disk is measured", 60)
        path = native.list()[0]["path"]
        before = sysfs.requests(path)
        until(lambda: sysfs.requests(path) > before, "requests are served")
        child.signal(number)
        assert child.wait(60) == 1, child.log
        assert f"interrupted by {number.name}" in child.log
    assert native.list() == []
    assert files(tmp_path) == []


def test_a_disk_that_was_given_is_only_read(native: Face, native_disk, tmp_path: Path) -> None:
    path = native_disk("-t", "mem", "--size", "64M")
    run(["mkfs.ext4", "-q", "-F", path])
    run(["mount", "-o", "ro", path, tmp_path])
    try:
        writes = sysfs.attribute(path, "stat").split()[4]
        disks = measured(bench(native, path, *QUICK, "--json", "-"))
        assert set(disks[path]) == {"randread-4k-qd1", "randread-4k-qd32", "read-128k-qd32"}
        assert sysfs.attribute(path, "stat").split()[4] == writes

        refused = bench(native, path, "--write", *QUICK, status=1)
        assert f"{path} is in use" in refused.err
        assert sysfs.attribute(path, "stat").split()[4] == writes
    finally:
        run(["umount", tmp_path])
    refused = bench(native, path, "--job", "randwrite-4k-qd1", status=1)
    assert "destroys the data" in refused.err


def test_write_allows_jobs_that_write(native: Face, native_disk) -> None:
    path = native_disk("-t", "mem", "--size", "4M")
    words = ("--write", "--job", "write-64k-qd4", "--requests", "200", "--windows", "2", "--json", "-")
    windows = measured(bench(native, path, *words))[path]["write-64k-qd4"]["windows"]
    assert [window["requests"] for window in windows] == [200, 200]
    with Disk(path, direct=True) as disk:
        assert any(disk.read(0, 4096))


def test_a_failed_job_keeps_the_other_results(native: Face, native_disk) -> None:
    small, large = native_disk("-t", "null", "--size", "64K"), native_disk("-t", "null", "--size", "1G")
    words = ("--job", "read-128k-qd2", "--job", "randread-4k-qd2", *QUICK, "--json", "-")
    result = bench(native, small, large, "/dev/null", *words, status=1)
    disks = measured(result)
    assert "smaller than a request" in disks[small]["read-128k-qd2"]["failed"]
    for job in (disks[small]["randread-4k-qd2"], *disks[large].values()):
        assert job["failed"] is None
        assert job["median"]["iops"] > 0
    assert json.loads(result.out)["absent"] == {"/dev/null": "/dev/null is not a block device"}
    assert f"{small} read-128k-qd2: " in result.err


@pytest.mark.io_errors
def test_a_disk_that_disappears_fails_its_job(native: Face) -> None:
    path = native.add("-t", "null")
    with Child([*native.argv, "bench", path, "--seconds", "300", "--job", "randread-4k-qd8"]) as child:
        until(lambda: sysfs.requests(path) > 100, "requests are served", 60)
        NATIVE.run("del", "--force", "-n", str(device_id(path)), timeout=60)
        assert child.wait(60) == 1, child.log
        assert f"{path} randread-4k-qd8: read of 4096 bytes at offset" in child.log, child.log


@pytest.mark.skipif(not has("QUIESCE"), reason="QUIESCE_DEV came with Linux 6.16")
def test_a_job_during_which_the_server_changes_has_no_figures_of_a_server(native: Face, scratch: Path) -> None:
    path = native.add("-t", "file", "-f", image(scratch), "--recovery")
    results = scratch / "bench.json"
    words = ("--job", "randread-4k-qd4", "--seconds", "0.5", "--windows", "1000", "--json", str(results))
    with Child([*native.argv, "bench", path, *words]) as child:
        # The warm-up and windows before the change and after it.
        until(lambda: sysfs.requests(path) > 1000, "requests are served", 60)
        native.run("upgrade", "-n", str(device_id(path)))
        served = sysfs.requests(path) + 1000
        until(lambda: sysfs.requests(path) > served, "requests are served by the new server", 60)
        child.signal(signal.SIGINT)
        assert child.wait(60) == 1, child.log
        assert "another process serves the disk now" in child.log
    ((job,),) = (disk["jobs"] for disk in json.loads(results.read_text())["disks"])
    assert job["windows"]
    for window in job["windows"]:
        assert "client_us" in window
        assert "server_us" not in window
    native.run("del", "-n", str(device_id(path)))


def test_marked_windows_have_exactly_as_many_requests(native: Face, native_disk) -> None:
    path = native_disk("-t", "null")
    words = ("--job", "randread-4k-qd32", "--requests", "1000", "--windows", "2", "--json", "-")
    result = bench(native, path, "--marks", *words)
    windows = measured(result)[path]["randread-4k-qd32"]["windows"]
    assert windows == [{"requests": 1000, "window": 0}, {"requests": 1000, "window": 1}]
    assert json.loads(result.out)["marks"] is True
