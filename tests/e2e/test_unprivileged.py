# SPDX-License-Identifier: MIT OR Apache-2.0
"""Disks of users who are not root, with the udev rules that they need and a real udev."""

import contextlib
import os
import shutil
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import fio, sysfs, udev
from support.command import Result, run
from support.face import Face, device_id
from support.features import has
from support.processes import is_running
from support.server import Child
from support.waiting import until

RULES = Path(__file__).parents[2] / "udev" / "60-ublk.rules"
INSTALLED = Path("/etc/udev/rules.d/60-ublk.rules")
CONTROL = "/dev/ublk-control"
ALICE, BOB = 1000, 1001

pytestmark = pytest.mark.skipif(not has("UNPRIVILEGED_DEV"), reason="users' devices came with Linux 6.3")


@pytest.fixture(scope="module", autouse=True)
def rules() -> Iterator[None]:
    """The rules as they are shipped, but for the program's place."""
    before = stat.S_IMODE(os.stat(CONTROL).st_mode)
    text = RULES.read_text()
    assert "/usr/bin/ublk" in text
    INSTALLED.parent.mkdir(parents=True, exist_ok=True)
    INSTALLED.write_text(text.replace("/usr/bin/ublk", shutil.which("ublk")))
    run(["udevadm", "control", "--reload"])
    run(["udevadm", "trigger", "--settle", CONTROL])
    assert stat.S_IMODE(os.stat(CONTROL).st_mode) == 0o666
    yield
    INSTALLED.unlink()
    run(["udevadm", "control", "--reload"])
    os.chmod(CONTROL, before)


def user(uid: int) -> dict[str, Any]:
    """How a program is started for a user."""
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    return {"cwd": "/", "env": environment | {"HOME": "/"}, "user": uid, "group": uid, "extra_groups": []}


def as_user(uid: int, *argv: str | os.PathLike, check: bool = True) -> Result:
    return run(argv, check=check, **user(uid))


def ublk(uid: int, *words: str | os.PathLike, check: bool = True) -> Result:
    return as_user(uid, "ublk", *words, check=check)


@pytest.fixture
def disk() -> Iterator[str]:
    """A RAM disk of Alice's."""
    added = ublk(ALICE, "add", "-t", "mem", "--size", "32M", "-q", "2")
    path = added.out.rstrip("\n")
    assert path.startswith("/dev/ublkb"), str(added)
    yield path
    if os.path.exists(path.replace("ublkb", "ublkc")):
        ublk(ALICE, "del", "-n", str(device_id(path)))


def owner(path: str) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)


@pytest.mark.short
def test_a_users_disk_from_beginning_to_end(disk: str, native: Face) -> None:
    number = str(device_id(disk))
    assert owner(disk) == owner(disk.replace("ublkb", "ublkc")) == (ALICE, ALICE, 0o600)
    info = native.info(disk)
    assert "UNPRIVILEGED_DEV" in info["features"]
    assert (info["state"], info["data"], info["owner_uid"], info["owner_gid"]) == ("LIVE", "copy", ALICE, ALICE)
    job = ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--size=8m"]
    as_user(ALICE, "fio", "--name=job", f"--filename={disk}", "--ioengine=io_uring", "--direct=1", *job)
    listed = ublk(ALICE, "list", "-n", number)
    assert disk in listed.out, str(listed)
    assert "write" in ublk(ALICE, "stat", "-n", number).out
    if has("UPDATE_SIZE"):
        ublk(ALICE, "resize", "-n", number, "-s", "16M")
        assert sysfs.size(disk) == 16 << 20
    ublk(ALICE, "del", "-n", number)
    assert not os.path.exists(disk)
    # The server's own end comes a moment after its device's.
    kept = Path("/tmp/ublk-1000")
    # A log would stay if there were something in it.
    until(lambda: not list(kept.iterdir()), "the end of the server, without a report")


def test_a_file_of_the_users_is_a_disk(tmp_path: Path) -> None:
    file = Path("/tmp/alices-disk.img")
    try:
        as_user(ALICE, "truncate", "-s", "32M", file)
        path = ublk(ALICE, "add", "-t", "file", "-f", file).out.rstrip("\n")
        try:
            as_user(ALICE, "/sbin/mkfs.ext4", "-q", path)
            as_user(ALICE, "/sbin/e2fsck", "-f", "-n", path)
        finally:
            ublk(ALICE, "del", "-n", str(device_id(path)))
        as_user(ALICE, "/sbin/e2fsck", "-f", "-n", file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            file.unlink()


@pytest.mark.parametrize("style", [[], ["--workers", "4"]], ids=["plain", "workers"])
def test_a_disk_in_python_is_a_users_from_beginning_to_end(style: list[str], python: Face, native: Face) -> None:
    words = ["run", "/opt/ublk/examples/ramdisk.py:RamDisk", "--size", "32M", *style]
    with Child([*python.argv, *words], **user(ALICE)) as server:
        disk = server.line()
        assert owner(disk) == owner(disk.replace("ublkb", "ublkc")) == (ALICE, ALICE, 0o600)
        assert "UNPRIVILEGED_DEV" in native.info(disk)["features"]
        job = ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--size=4m"]
        as_user(ALICE, "fio", "--name=job", f"--filename={disk}", "--ioengine=io_uring", "--direct=1", *job)
        if has("UPDATE_SIZE"):
            number = device_id(disk)
            as_user(ALICE, *python.argv[:1], "-c", f"import ublk; ublk.SystemDevice({number}).resize(16 << 20)")
            assert sysfs.size(disk) == 16 << 20
        server.signal(signal.SIGINT)
        assert server.wait() in (0, 130), server.log
    assert native.list() == []


def test_a_recoverable_disk_in_python_takes_root(python: Face) -> None:
    code = "import ublk; ublk.Null(1 << 20).start(recoverable=True)"
    refused = as_user(ALICE, *python.argv[:1], "-c", code, check=False)
    assert refused.status == 1, str(refused)
    assert "CAP_SYS_ADMIN" in refused.err, str(refused)


def test_it_is_nobody_elses(disk: str) -> None:
    number = str(device_id(disk))
    for words in (["del", "-n", number], ["del", "--force", "-n", number], ["resize", "-n", number, "-s", "8M"]):
        refused = ublk(BOB, *words, check=False)
        assert refused.status == 1, str(refused)
    read = as_user(BOB, "dd", f"if={disk}", "of=/dev/null", "count=1", check=False)
    assert read.status == 1, str(read)
    listed = ublk(BOB, "list")
    assert disk not in listed.out, str(listed)
    assert "1 device owned by other users not shown" in listed.err, str(listed)
    fio.verify(disk, size="1m", bs="4k", iodepth=4)


def test_what_somebody_else_has_prepared_is_not_believed(native: Face) -> None:
    place = Path("/tmp/ublk-1000")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    os.chown(place, BOB, BOB)
    try:
        refused = ublk(ALICE, "add", "-t", "mem", "--size", "1M", check=False)
        assert refused.status == 1, str(refused)
        assert str(place) in refused.err, str(refused)
        assert native.list() == []
    finally:
        shutil.rmtree(place)


@contextlib.contextmanager
def prepared_by_bob(code: str) -> Iterator[None]:
    """The place of Alice's files, made by another user, who puts something there for each of her devices."""
    place = Path("/tmp/ublk-1000")
    shutil.rmtree(place, ignore_errors=True)
    begin = f"import os, socket\nplace = {str(place)!r}\nos.umask(0)\nos.mkdir(place, 0o777)\n"
    each = f"for n in range(4):\n    name = f'{{place}}/ublkb{{n}}.json'\n    {code}"
    as_user(BOB, sys.executable, "-c", begin + each)
    try:
        yield
    finally:
        shutil.rmtree(place, ignore_errors=True)


@pytest.mark.parametrize(
    "code", ["os.mkfifo(name, 0o666)", "os.symlink('/dev/zero', name)", "os.mkdir(name)"], ids=["fifo", "link", "dir"]
)
def test_another_users_files_hold_up_no_command(code: str, native: Face) -> None:
    with prepared_by_bob(code):
        refused = ublk(ALICE, "add", "-t", "mem", "--size", "1M", check=False)
        assert refused.status == 1, str(refused)
        # udev is busy with the device that was made and removed.
        udev.settle()
        # The log is out of the other user's reach; the state is not kept.
        path = ublk(ALICE, "add", "-t", "mem", "--size", "1M", "--log", "/dev/null").out.rstrip("\n")
        pid = native.info(path)["pid"]
        number = str(device_id(path))
        assert ublk(ALICE, "stat", "-n", number, check=False).status == 1
        ublk(ALICE, "del", "-n", number)
        until(lambda: not is_running(pid), "the server's end")
    assert native.list() == []


def test_another_users_socket_answers_for_no_server(native: Face) -> None:
    with prepared_by_bob("pass"):
        path = ublk(ALICE, "add", "-t", "mem", "--size", "1M", "--log", "/dev/null").out.rstrip("\n")
        place = f"/tmp/ublk-1000/server-{native.info(path)['pid']}.sock"
        code = (
            "import os, socket\n"
            f"s = socket.socket(socket.AF_UNIX); s.bind({place!r}); os.chmod({place!r}, 0o666); s.listen()\n"
            "print('ready', flush=True)\n"
            "while True:\n"
            '    c, _ = s.accept(); c.recv(100); c.sendall(b\'{"total":{},"queues":{}}\\n\'); c.close()\n'
        )
        with Child([sys.executable, "-c", code], **user(BOB)) as fake:
            assert fake.line() == "ready"
            refused = ublk(ALICE, "stat", "-n", str(device_id(path)), check=False)
            assert refused.status == 1, str(refused)
            fake.signal(signal.SIGKILL)
            fake.wait()
        ublk(ALICE, "del", "-n", str(device_id(path)))


@pytest.mark.io_errors
def test_del_dead_of_a_user_passes_over_others_devices(disk: str, native: Face) -> None:
    roots = native.add("-t", "null")
    pid = native.info(disk)["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: native.info(disk)["state"] == "DEAD", "the state DEAD", 45)
    ublk(ALICE, "del", "--dead")
    assert [device["path"] for device in native.list()] == [roots]
    native.run("del", "-n", str(device_id(roots)))


def test_a_late_udev_gives_no_node_of_root_away(native: Face) -> None:
    """What udev runs for a user's device, when its number is root's."""
    path = native.add("-t", "null")
    for node in (path, path.replace("ublkb", "ublkc")):
        refused = native.run("owner", "--apply", os.path.basename(node), check=False)
        assert refused.status == 1, str(refused)
        assert owner(node)[0] == 0
    native.run("del", "-n", str(device_id(path)))


def test_root_looks_after_it(disk: str, native: Face) -> None:
    assert native.info(disk)["owner_uid"] == ALICE
    native.run("del", "-n", str(device_id(disk)))
    until(lambda: not os.path.exists(disk.replace("ublkb", "ublkc")), "the device's end")


def test_roots_disk_stays_roots(native: Face) -> None:
    path = native.add("-t", "mem", "--size", "1M")
    number = str(device_id(path))
    assert owner(path)[0] == owner(path.replace("ublkb", "ublkc"))[0] == 0
    assert "UNPRIVILEGED_DEV" not in native.info(path)["features"]
    for words in (["del", "-n", number], ["del", "--force", "-n", number], ["resize", "-n", number, "-s", "512K"]):
        refused = ublk(ALICE, *words, check=False)
        assert refused.status == 1, str(refused)
    assert as_user(ALICE, "dd", f"if={path}", "of=/dev/null", "count=1", check=False).status == 1
    assert native.info(path)["state"] == "LIVE"
    native.run("del", "-n", number)


def test_what_takes_root_is_refused_in_words() -> None:
    for words in (["--recovery"], ["--data", "user-copy"]):
        refused = ublk(ALICE, "add", "-t", "null", "--size", "1M", *words, check=False)
        assert refused.status == 1, str(refused)
        assert "CAP_SYS_ADMIN" in refused.err, str(refused)


@pytest.mark.io_errors
def test_a_killed_server_takes_the_disk_with_it(disk: str, native: Face) -> None:
    pid = native.info(disk)["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_running(pid), "the server's end")
    until(lambda: not os.path.exists(disk), "the disk's end", 45)
    ublk(ALICE, "del", "--dead")
    assert native.list() == []


def test_without_the_rules_it_is_said_what_is_missing(native: Face) -> None:
    text = INSTALLED.read_text()
    try:
        INSTALLED.write_text("")
        run(["udevadm", "control", "--reload"])
        refused = ublk(ALICE, "add", "-t", "null", check=False)
        assert refused.status == 1, str(refused)
        assert "udev rules" in refused.err, str(refused)
    finally:
        INSTALLED.write_text(text)
        run(["udevadm", "control", "--reload"])
        # A user cannot delete what he may not open.
        native.run("del", "-a")
