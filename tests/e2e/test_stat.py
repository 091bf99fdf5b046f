# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a server has done can be seen from outside."""

import json
import os
import signal
import socket
from pathlib import Path

import pytest
from support import fio
from support.backends import image
from support.blockio import Disk
from support.command import run
from support.face import NATIVE, Face, device_id
from support.server import Child, Server
from support.waiting import until

pytestmark = pytest.mark.long


def stat(native: Face, path: str) -> dict:
    return json.loads(native.run("stat", "-n", str(device_id(path)), "--json").out)


def test_requests_and_bytes_are_those_of_the_client(face: Face, scratch: Path) -> None:
    path = face.add("-t", "file", "-f", image(scratch, 16 << 20), "-q", "2")
    before = stat(face, path)["total"]
    with Disk(path, direct=True) as disk:
        for n in range(10):
            disk.write(n * 8192, bytes(8192))
        for n in range(7):
            disk.read(n * 4096, 4096)
        disk.sync()
        disk.discard(0, 65536)
    now = stat(face, path)["total"]

    def grown(op: str, field: str) -> int:
        return now[op][field] - before.get(op, {field: 0})[field]

    assert (grown("write", "requests"), grown("write", "bytes")) == (10, 81920)
    assert (grown("read", "requests"), grown("read", "bytes")) == (7, 28672)
    assert grown("flush", "requests") >= 1
    assert (grown("discard", "requests"), grown("discard", "bytes")) == (1, 65536)
    for row in now.values():
        latency = row["latency_ns"]
        assert 0 < latency["min"] <= latency["p50"] <= latency["p99"] <= latency["max"]
        assert sum(count for _, count in latency["buckets"]) == row["requests"]
        assert row["errors"] == 0
    face.run("del", "-n", str(device_id(path)))


def test_the_queues_add_up(native: Face) -> None:
    path = native.add("-t", "mem", "--size", "16M", "-q", "2")
    fio.verify(path, size="4m", bs="4k", iodepth=32, numjobs=1)
    report = stat(native, path)
    for op, total in report["total"].items():
        assert total["requests"] == sum(
            queue.get(op, {"requests": 0})["requests"] for queue in report["queues"].values()
        )
    assert report["total"]["write"]["requests"] >= 1024
    native.run("del", "-n", str(device_id(path)))


@pytest.mark.io_errors
def test_failed_requests_are_errors(native: Face, scratch: Path) -> None:
    file = image(scratch, 16 << 20)
    path = native.add("-t", "file", "-f", file, "--io", "buffered")
    os.truncate(file, 1 << 20)
    with Disk(path, direct=True) as disk, pytest.raises(OSError):
        disk.read(8 << 20, 4096)
    assert stat(native, path)["total"]["read"]["errors"] >= 1
    native.run("del", "-n", str(device_id(path)))


def test_the_table_is_for_people(native: Face) -> None:
    path = native.add("-t", "null")
    with Disk(path, direct=True) as disk:
        disk.write(0, bytes(4096))
    lines = native.run("stat", "-n", str(device_id(path))).out.splitlines()
    assert lines[0].split()[:3] == ["operation", "requests", "MiB"]
    assert any(line.startswith("write") for line in lines)
    native.run("del", "-n", str(device_id(path)))


def test_watching_ends_with_ctrl_c_and_with_the_device(native: Face) -> None:
    path = native.add("-t", "null")
    number = str(device_id(path))
    with fio.Load(path), Child([*native.argv, "stat", "-n", number, "--watch", "0.2"]) as watcher:
        for _ in range(4):
            assert watcher.line()
        watcher.signal(signal.SIGINT)
        assert watcher.wait() in (-signal.SIGINT, 130)
    with Child([*native.argv, "stat", "-n", number, "--watch", "0.2", "--json"]) as watcher:
        assert "total" in json.loads(watcher.line())
        native.run("del", "-n", number)
        until(lambda: watcher.process.poll() is not None, "the watcher's end")


def test_a_device_without_a_server_says_so(native: Face) -> None:
    path = native.add("-t", "null")
    pid = native.info(path)["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: native.list()[0]["state"] == "DEAD", "the state DEAD")
    refused = native.run("stat", "-n", str(device_id(path)), check=False)
    assert refused.status == 1, str(refused)
    assert refused.err.startswith("ublk: "), str(refused)
    native.run("del", "--dead")


def test_only_the_servers_user_can_ask(native: Face) -> None:
    path = native.add("-t", "null")
    address = Path(f"/run/ublk/server-{native.info(path)['pid']}.sock")
    assert address.stat().st_mode & 0o777 == 0o600
    native.run("del", "-n", str(device_id(path)))
    until(lambda: not address.exists(), "the end of the socket")


def test_a_dead_servers_socket_is_removed(native: Face) -> None:
    path = native.add("-t", "null")
    pid = native.info(path)["pid"]
    address = Path(f"/run/ublk/server-{pid}.sock")
    os.kill(pid, signal.SIGKILL)
    until(lambda: native.list()[0]["state"] == "DEAD", "the state DEAD")
    assert address.exists()
    refused = native.run("stat", "-n", str(device_id(path)), check=False)
    assert "device 0 has no server: it is DEAD" in refused.err, str(refused)
    native.run("del", "--dead")
    assert not address.exists()


def test_a_client_that_says_nothing_holds_up_nobody(native: Face) -> None:
    path = native.add("-t", "null")
    pid = native.info(path)["pid"]
    address = f"/run/ublk/server-{pid}.sock"
    with socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as dripping:
        silent.connect(address)
        dripping.connect(address)
        for letter in b"stat":
            dripping.send(bytes([letter]))
            assert stat(native, path)["total"].keys() <= {"read"}
        os.kill(pid, signal.SIGTERM)
        until(lambda: not os.path.exists(path), "the device's end", 5)
    until(lambda: not os.path.exists(f"/proc/{pid}"), "the server's end")


def test_a_watcher_that_nobody_reads_ends(native: Face) -> None:
    path = native.add("-t", "null")
    line = f"ublk stat -n {device_id(path)} --watch 0.1 --json | head -n 1"
    assert run(["sh", "-c", line], timeout=20).out.startswith("{")
    native.run("del", "-n", str(device_id(path)))


def test_a_python_server_is_asked_as_well(native: Face) -> None:
    with Server("Ram", count=2) as server:
        for path in server.paths:
            with Disk(path, direct=True) as disk:
                disk.write(0, bytes(4096))
            write = stat(native, path)["total"]["write"]
            assert (write["requests"], write["bytes"], write["errors"]) == (1, 4096, 0)
        assert Path(f"/run/ublk/server-{server.pid}.sock").exists()
    assert not Path(f"/run/ublk/server-{server.pid}.sock").exists()


def test_a_server_that_answers_nobody_is_named() -> None:
    with Server("Ram") as server:
        Path(f"/run/ublk/server-{server.pid}.sock").unlink()
        refused = NATIVE.run("stat", "-n", str(server.id), check=False)
        assert refused.status == 1, str(refused)
        assert f"no server answers for device {server.id}: process {server.pid} serves it" in refused.err, str(refused)
