# SPDX-License-Identifier: MIT OR Apache-2.0
"""The command line: both programs accept the same and answer the same."""

import json
import os
import re
import signal

import pytest
from support import driver, kernel, sysfs
from support.blockio import Disk
from support.command import run
from support.face import Face, device_id
from support.model import Model, exercise
from support.server import Child

pytestmark = pytest.mark.long


@pytest.mark.short
def test_add_prints_the_path_and_nothing_else(face: Face) -> None:
    result = face.run("add", "-t", "null", "-n", "4")
    assert (result.out, result.err) == ("/dev/ublkb4\n", "")
    face.run("del", "-n", "4")


def test_add_takes_the_lowest_free_id(native: Face) -> None:
    paths = [native.add("-t", "null") for _ in range(3)]
    assert paths == ["/dev/ublkb0", "/dev/ublkb1", "/dev/ublkb2"]
    native.run("del", "-n", "1")
    assert native.add("-t", "null") == "/dev/ublkb1"
    native.run("del", "-a")


@pytest.mark.parametrize(
    ("text", "size"), [("1048576", 1 << 20), ("64K", 64 << 10), ("3M", 3 << 20), ("2G", 2 << 30), ("1T", 1 << 40)]
)
def test_sizes_take_suffixes(native: Face, text: str, size: int) -> None:
    path = native.add("-t", "null", "--size", text)
    assert sysfs.size(path) == size
    native.run("del", "-n", str(device_id(path)))


def test_default_sizes(native: Face) -> None:
    assert sysfs.size(native.add("-t", "null")) == 250 << 30
    assert sysfs.size(native.add("-t", "mem")) == 1 << 30
    native.run("del", "-a")


def test_a_native_target_stores_data(face: Face) -> None:
    path = face.add("-t", "mem", "--size", "4M", "-q", "2")
    with Disk(path, direct=True) as disk:
        exercise(disk, Model(4 << 20), unit=512, longest=128 << 10, steps=50, seed=30)
    face.run("del", "-n", str(device_id(path)))


def test_list_json_describes_every_device(face: Face) -> None:
    assert face.list() == []
    first = face.add("-t", "mem", "--size", "1M", "-d", "16", "--read-only")
    second = face.add("-t", "null", "-q", "2", "--block-size", "4096")
    devices = {device["path"]: device for device in face.list()}
    assert set(devices) == {first, second}
    keys = {"id", "path", "state", "pid", "queues", "depth", "size", "block_size", "max_io_bytes", "read_only", "flags"}
    assert keys <= set(devices[first])
    for path, expected in (
        (
            first,
            {"id": 0, "state": "LIVE", "queues": 1, "depth": 16, "size": 1 << 20, "block_size": 512, "read_only": True},
        ),
        (
            second,
            {
                "id": 1,
                "state": "LIVE",
                "queues": 2,
                "depth": 128,
                "size": 250 << 30,
                "block_size": 4096,
                "read_only": False,
            },
        ),
    ):
        assert {key: devices[path][key] for key in expected} == expected
        assert os.path.exists(f"/proc/{devices[path]['pid']}")
    assert devices[first]["pid"] != devices[second]["pid"]
    face.run("del", "-a")


def test_list_can_be_limited_to_devices(native: Face) -> None:
    first, second = native.add("-t", "null"), native.add("-t", "null")
    assert [device["path"] for device in native.list("-n", "1")] == [second]
    assert [device["path"] for device in native.list("-n", "0")] == [first]
    native.run("del", "-a")


def test_list_without_devices_is_empty(face: Face) -> None:
    result = face.run("list")
    assert (result.out, result.err) == ("", "")


@pytest.mark.short
def test_features_names_what_the_driver_has(face: Face) -> None:
    lines = face.run("features").out.splitlines()
    features = {}
    for line in lines:
        match = re.fullmatch(r"\s*(\w+)\s+(yes|no)\s+(?:\S+ )*?(?:Linux )?(\d+\.\d+)\S*", line)
        if match:
            features[match[1].removeprefix("UBLK_F_")] = (match[2] == "yes", match[3])
    assert {"CMD_IOCTL_ENCODE", "USER_COPY", "NEED_GET_DATA", "SUPPORT_ZERO_COPY", "BATCH_IO"} <= set(features), lines
    assert features["CMD_IOCTL_ENCODE"] == (True, "6.4")
    assert features["USER_COPY"][0] is True
    # A kernel has what it is old enough for; an own driver may have more.
    if not driver.is_bundled():
        for name in ("AUTO_BUF_REG", "BATCH_IO"):
            since = tuple(map(int, features[name][1].split(".")))
            assert features[name][0] == (since <= kernel.VERSION), (name, features[name], kernel.VERSION)


def test_features_json_agrees_with_the_text(native: Face) -> None:
    text = native.run("features").out
    decoded = json.loads(native.run("features", "--json").out)
    rows = decoded.items() if isinstance(decoded, dict) else ((row["name"], row) for row in decoded)
    for name, value in rows:
        assert str(name).removeprefix("UBLK_F_") in text, (name, value)


def test_both_programs_see_the_same(native: Face, python: Face) -> None:
    native.add("-t", "mem", "--size", "1M")
    python.add("-t", "null")
    assert native.list() == python.list()
    assert native.run("list").out == python.run("list").out
    assert native.run("features").out == python.run("features").out
    python.run("del", "-n", "0")
    native.run("del", "-n", "1")
    assert python.list() == []


@pytest.mark.parametrize("words", [["--help"], ["add", "--help"], ["del", "--help"], ["list", "--help"], ["--version"]])
def test_help_goes_to_standard_output(face: Face, words: list[str]) -> None:
    result = face.run(*words)
    assert result.out.strip(), str(result)
    assert result.err == "", str(result)


def test_loop_is_another_name_for_file(native: Face, tmp_path) -> None:
    file = tmp_path / "disk.img"
    file.write_bytes(bytes(1 << 20))
    path = native.add("-t", "loop", "-f", file, "--io", "buffered")
    assert sysfs.size(path) == 1 << 20
    native.run("del", "-n", str(device_id(path)))


def test_a_relative_path_is_the_caller_s(face: Face, tmp_path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    path = face.add("-t", "file", "-f", "disk.img", "--io", "buffered", cwd=tmp_path)
    assert sysfs.size(path) == 1 << 20
    face.run("del", "-n", str(device_id(path)))


def test_the_python_program_serves_in_the_foreground(python: Face) -> None:
    with Child([*python.argv, "add", "-t", "mem", "--size", "1M", "--foreground"]) as server:
        path = server.line()
        assert sysfs.size(path) == 1 << 20
        server.signal(signal.SIGINT)
        assert server.wait() == 0, server.log
        assert not os.path.exists(path)


def test_the_console_script_is_the_same_program(python: Face) -> None:
    script = os.path.join(os.environ["PYTHONPATH"].split(":")[0], "bin", "ublk")
    assert run([script, "list", "--json"]).out == python.run("list", "--json").out
    assert run([script, "--help"]).out == python.run("--help").out
