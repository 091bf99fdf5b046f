# SPDX-License-Identifier: MIT OR Apache-2.0
"""Python servers come and go, in good order and otherwise."""

import os
import signal
import sys
from pathlib import Path

import pytest
from support import driver, fio, udev
from support.blockio import Disk, Tasks, error_of
from support.command import Result, run
from support.face import Face, device_id
from support.processes import is_running
from support.server import HERE, Child, Server
from support.waiting import until


def gone(path: str) -> bool:
    return not os.path.exists(path) and not os.path.exists(path.replace("ublkb", "ublkc"))


def remove_the_dead(native: Face) -> None:
    """Deletes what a server that was killed left, once the driver has noticed its end."""
    until(lambda: {device["state"] for device in native.list()} <= {"DEAD"}, "the state DEAD")
    native.run("del", "--dead")
    assert native.list() == []


def program(text: str, **options) -> Result:
    """A Python program that can import the disks of the tests."""
    return run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(HERE)!r})\n" + text], **options)


@pytest.mark.short
def test_leaving_the_with_block_removes_the_device() -> None:
    result = program(
        """
import os
from disks import Ram
with Ram().start() as dev:
    print(dev.path, os.path.exists(dev.path), dev.running)
print(os.path.exists(dev.path), dev.running)
"""
    )
    assert result.out == "/dev/ublkb0 True True\nFalse False\n", str(result)
    assert result.err == "", str(result)


def test_leaving_the_with_block_by_an_exception_removes_the_device() -> None:
    result = program(
        """
import os
from disks import Ram
try:
    with Ram().start() as dev:
        raise LookupError("on purpose")
except LookupError as error:
    print(error, os.path.exists(dev.path))
"""
    )
    assert result.out == "on purpose False\n", str(result)


@pytest.mark.parametrize(
    "end",
    [
        "pass",
        *(pytest.param(end, marks=pytest.mark.long) for end in ("sys.exit(5)", "raise LookupError('on purpose')")),
    ],
)
def test_the_interpreter_s_exit_removes_the_device(end: str) -> None:
    result = program(f"from disks import Ram\ndev = Ram().start()\nprint(dev.path)\n{end}\n", check=False)
    assert result.out == "/dev/ublkb0\n"
    assert result.status == {"pass": 0, "sys.exit(5)": 5}.get(end, 1), str(result)
    assert gone("/dev/ublkb0")


@pytest.mark.io_errors
def test_the_interpreter_s_exit_in_the_middle_of_io_removes_the_device() -> None:
    with Server("Ram", size=64 << 20, queues=2) as server, fio.Load(server.path, numjobs=2) as load:
        load.wait_until_busy()
        server.expect_end()
        server.say("exit")
        assert server.wait() == 0, server.log
        assert gone(server.path)
        load.wait()


@pytest.mark.long
@pytest.mark.io_errors
def test_a_process_that_ends_without_clean_up_leaves_a_dead_device(native: Face) -> None:
    result = program("import os\nfrom disks import Ram\ndev = Ram().start()\nos._exit(0)\n")
    assert result.status == 0
    remove_the_dead(native)


@pytest.mark.long
@pytest.mark.io_errors
def test_a_handler_that_kills_its_process_hangs_nobody(native: Face) -> None:
    with Server("Dies") as server:
        server.expect_end()
        with Disk(server.path, direct=True) as disk:
            assert error_of(lambda: disk.read(1000 * 512, 512)) != 0
        assert server.wait() == 3
    remove_the_dead(native)


@pytest.mark.io_errors
@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.long) for number in (signal.SIGHUP, signal.SIGINT))],
    ids=lambda n: n.name,
)
def test_a_signal_in_the_middle_of_io_removes_the_device(number: signal.Signals) -> None:
    with Server("Ram", size=64 << 20, queues=2) as server, fio.Load(server.path, numjobs=2) as load:
        load.wait_until_busy()
        status = server.kill(number)
        assert status in (128 + number, -number, 1), server.log
        assert gone(server.path)
        load.wait()


@pytest.mark.short
@pytest.mark.io_errors
def test_sigkill_in_the_middle_of_io_hangs_nobody(native: Face) -> None:
    with Server("Ram", size=64 << 20, queues=2) as server, fio.Load(server.path, numjobs=2) as load:
        load.wait_until_busy()
        assert server.kill() == -signal.SIGKILL
        assert load.wait(15) != 0, "fio did not notice that its disk is gone"
    remove_the_dead(native)
    assert gone(server.path)


@pytest.mark.io_errors
def test_sigkill_while_a_handler_never_returns_hangs_nobody(native: Face) -> None:
    with Server("Blocking") as server, Disk(server.path, direct=True) as disk:
        tasks = Tasks()
        errors = []
        tasks.start(lambda: errors.append(error_of(lambda: disk.read(1000 * 512, 512))))
        assert server.ask("disk.waiting.wait(10)") is True
        server.kill()
        tasks.join(15)
        assert errors
        assert errors[0] != 0
    remove_the_dead(native)


@pytest.mark.long
@pytest.mark.io_errors
def test_sigkill_after_a_stop_that_waits_for_a_handler_hangs_nobody(native: Face) -> None:
    with Server("Blocking") as server, Disk(server.path, direct=True) as disk:
        tasks = Tasks()
        tasks.start(lambda: error_of(lambda: disk.read(1000 * 512, 512)))
        assert server.ask("disk.waiting.wait(10)") is True
        server.signal(signal.SIGTERM)
        assert server.process.poll() is None
        # Until the stop is under way.
        run(["sleep", "2"])
        server.kill()
        tasks.join(15)
        until(lambda: not is_running(server.pid), "the server's end", 15)
    remove_the_dead(native)


HANGS = """
import mmap
import os
import sys
import threading
import time

import ublk

class Hangs(ublk.BlockDevice):
    def __init__(self):
        super().__init__(size=1 << 20)

    def read(self, offset, buf):
        if armed and offset == 307200:
            print("reached", flush=True)
            time.sleep(1e6)

armed = False
with Hangs().start() as dev:
    print(dev.path, flush=True)
    # udev reads here and there.
    sys.stdin.readline()
    armed = True
    print("armed", flush=True)

    def use():
        own = os.open(dev.path, os.O_RDONLY | os.O_DIRECT)
        os.preadv(own, [mmap.mmap(-1, 4096)], 307200)

    if "own" in sys.argv:
        threading.Thread(target=use, daemon=True).start()
    dev.wait()
"""


def arm(server: Child, since: float) -> str:
    """Waits until udev has looked at the disk, and has its reads hang from then on."""
    path = server.line(90)
    udev.wait_until_seen(path, since)
    server.say("arm")
    assert server.line(90) == "armed"
    return path


@pytest.mark.long
@pytest.mark.io_errors
@pytest.mark.time_limit(240)
def test_del_force_kills_a_server_that_hangs(native: Face) -> None:
    since = udev.now()
    with Child([sys.executable, "-c", HANGS]) as server:
        path = arm(server, since)
        with Disk(path, direct=True) as disk:
            tasks = Tasks()
            tasks.start(lambda: error_of(lambda: disk.read(307200, 4096)))
            assert server.line() == "reached"
            removed = native.run("del", "--force", "-n", str(device_id(path)), timeout=120)
            assert f"killing its server, process {server.pid}" in removed.err, str(removed)
            tasks.join(30)
        assert server.wait() == -signal.SIGKILL
    until(lambda: native.list() == [], "the device's end")


@pytest.mark.long
@pytest.mark.skipif(not driver.is_bundled(), reason="Linux's driver aborts no request of a server that cannot die")
@pytest.mark.io_errors
@pytest.mark.time_limit(240)
def test_del_force_ends_a_server_that_waits_for_its_own_disk(native: Face) -> None:
    since = udev.now()
    with Child([sys.executable, "-c", HANGS, "own"]) as server:
        path = arm(server, since)
        assert server.line() == "reached"
        removed = native.run("del", "--force", "-n", str(device_id(path)), timeout=120)
        assert f"killing its server, process {server.pid}" in removed.err, str(removed)
        assert "waits for itself" in removed.err, str(removed)
        assert server.wait() == -signal.SIGKILL
    until(lambda: native.list() == [], "the device's end")


@pytest.mark.io_errors
def test_del_from_outside_while_busy(face: Face) -> None:
    with Server("Ram", size=64 << 20) as server, fio.Load(server.path) as load:
        load.wait_until_busy()
        face.run("del", "--force", "-n", str(server.id))
        assert gone(server.path)
        assert load.wait(15) != 0
        # The program learns of it, and its own stop is harmless.
        assert server.ask("dev.wait(10)") is True
        assert server.ask("dev.running") is False
        server.ask("dev.stop()")


def test_stop_twice_is_harmless() -> None:
    with Server("Ram") as server:
        server.ask("dev.stop()")
        assert gone(server.path)
        server.ask("dev.stop()")
        assert server.ask("dev.running") is False
        assert server.ask("dev.wait(5)") is True


def test_stop_by_another_thread_ends_the_wait() -> None:
    result = program(
        """
import threading
from disks import Ram
dev = Ram().start()
threading.Timer(0.5, dev.stop).start()
print(dev.wait(20), dev.running)
"""
    )
    assert result.out == "True False\n", str(result)


def test_stop_by_many_threads_at_once() -> None:
    result = program(
        """
import threading
from disks import Ram
dev = Ram(size=1 << 20).start(queues=2)
threads = [threading.Thread(target=dev.stop) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join(20) for thread in threads]
print(any(thread.is_alive() for thread in threads), dev.running)
"""
    )
    assert result.out == "False False\n", str(result)
    assert result.err == "", str(result)


def test_wait_with_a_timeout_returns_false() -> None:
    with Server("Ram") as server:
        assert server.ask("dev.wait(0.2)") is False
        assert server.ask("dev.running") is True


def test_a_device_can_be_started_again(native: Face) -> None:
    result = program(
        """
from disks import Ram
disk = Ram(size=1 << 20)
for _ in range(3):
    with disk.start(id=6) as dev:
        print(dev.path)
"""
    )
    assert result.out == "/dev/ublkb6\n" * 3, str(result)
    assert native.list() == []


def test_a_forked_child_does_not_take_the_device_with_it() -> None:
    result = program(
        """
import os, warnings
warnings.simplefilter("ignore")
from disks import Ram
with Ram().start() as dev:
    child = os.fork()
    if child == 0:
        raise SystemExit(0)
    os.waitpid(child, 0)
    print(os.path.exists(dev.path), dev.running)
    with open(dev.path, "rb") as disk:
        print(len(disk.read(4096)))
"""
    )
    assert result.out == "True True\n4096\n", str(result)
    assert gone("/dev/ublkb0")


def test_a_child_process_does_not_keep_the_device() -> None:
    # Programs that a server starts must not inherit what holds the device.
    result = program(
        """
import subprocess
from disks import Ram
with Ram().start() as dev:
    child = subprocess.Popen(["sleep", "30"], close_fds=False)
print(child.poll())
child.kill()
child.wait()
"""
    )
    assert result.out == "None\n", str(result)


def test_a_disk_that_is_written_in_its_own_process() -> None:
    # The server's own main thread uses the disk, which works because handlers run beside it.
    result = program(
        """
import os
from disks import Ram
with Ram(size=1 << 20).start() as dev:
    fd = os.open(dev.path, os.O_RDWR)
    os.pwrite(fd, b"x" * 65536, 4096)
    os.fsync(fd)
    print(os.pread(fd, 65536, 4096) == b"x" * 65536)
    os.close(fd)
"""
    )
    assert result.out == "True\n", str(result)


def test_garbage_of_a_stopped_device_is_collected() -> None:
    result = program(
        """
import gc, weakref
from disks import Ram
disk = Ram(size=1 << 20)
gone = weakref.ref(disk)
with disk.start() as dev:
    pass
del disk, dev
gc.collect()
print(gone() is None)
"""
    )
    assert result.out == "True\n", str(result)


RUN = """
import ublk
from disks import {disk}
ublk.run({disk}())
print("after run")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_run_returns_by(number: signal.Signals) -> None:
    text = f"import sys; sys.path.insert(0, {str(HERE)!r})\n" + RUN.format(disk="Ram")
    with Child([sys.executable, "-c", text]) as server:
        path = server.line()
        assert os.path.exists(path)
        server.signal(number)
        assert server.line() == "after run"
        assert server.wait() == 0, server.log
        assert gone(path)


def test_run_returns_when_the_device_is_deleted(native: Face) -> None:
    text = f"import sys; sys.path.insert(0, {str(HERE)!r})\n" + RUN.format(disk="Ram")
    with Child([sys.executable, "-c", text]) as server:
        path = server.line()
        native.run("del", "-n", str(device_id(path)))
        assert server.line() == "after run"
        assert server.wait() == 0, server.log


@pytest.mark.io_errors
def test_system_exit_in_a_handler_ends_run() -> None:
    text = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import ublk
from disks import Failing
disk = Failing()
import threading
def arm():
    disk.fail("read", "SystemExit(9)")
threading.Timer(1.5, arm).start()
ublk.run(disk)
"""
    with Child([sys.executable, "-c", text]) as server:
        path = server.line()

        with Disk(path, direct=True) as disk:
            # Until the handler is armed.
            until(lambda: error_of(lambda: disk.read(0, 512)) != 0, "a read that fails", 15, step=0.2)
        assert server.wait() == 9, server.log
        assert gone(path)


def test_the_file_of_the_readme_serves_when_it_is_run(native: Face) -> None:
    example = Path("/opt/ublk/examples/ramdisk.py")
    with Child([sys.executable, str(example)]) as server:
        path = server.line()
        assert native.info(path)["size"] == 1 << 30
        with Disk(path, direct=True) as disk:
            disk.write(4096, b"\x66" * 8192)
            assert disk.read(4096, 8192) == b"\x66" * 8192
        server.signal(signal.SIGINT)
        assert server.wait() == 0, server.log
        assert gone(path)
