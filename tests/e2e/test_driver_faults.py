# SPDX-License-Identifier: MIT OR Apache-2.0
"""What clients and servers can do to the driver of kmod/ without hanging anything or anyone else.

Each test is a fault that the driver had. The servers speak the protocol themselves (`raw_server.py`) where the engine
would not do such a thing.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import driver, raw, udev
from support.aio import Aio
from support.blockio import SECTOR, Disk, Tasks, error_of
from support.features import has
from support.gate import GATE
from support.processes import is_running, kill, threads
from support.server import HERE, Child, Server
from support.waiting import until

ALICE, BOB = 1000, 1001
# A request's time-out in the driver, and what a busy machine adds.
TIME_OUT = 30.0
BLKRRPART = 0x125F
HELD = 8 * 55 * SECTOR

pytestmark = pytest.mark.skipif(not driver.is_bundled(), reason="about the driver of kmod/")
batch_or_not = pytest.mark.parametrize(
    "mode",
    [
        pytest.param(0, id="single"),
        pytest.param(raw.BATCH_IO, id="batch", marks=pytest.mark.skipif(not has("BATCH_IO"), reason="Linux 7.0")),
    ],
)


class RawServer(Child):
    """`raw_server.py` with these options; ends with the `with` block, and so does its device."""

    def __init__(self, **options: Any) -> None:
        super().__init__([sys.executable, "-u", str(HERE / "raw_server.py"), json.dumps(options)])
        self.id = int(self.line())
        self.node = raw.BLOCK_DEVICE.format(self.id)
        user = options.get("uid", 0)
        for node in (raw.CHAR_DEVICE, raw.BLOCK_DEVICE) if user else ():
            self._give(node.format(self.id), user)
        ready = json.loads(self.line())
        self.server, self.keeper = ready["pid"], ready["keeper"]

    def _give(self, node: str, user: int) -> None:
        """A node to a user, as a rule of udev would; the block device's comes when the disk starts."""

        def give() -> None:
            until(lambda: os.path.exists(node), node, 60)
            with contextlib.suppress(FileNotFoundError):
                os.chown(node, user, user)

        threading.Thread(target=give, daemon=True).start()

    def ask(self, expression: str) -> Any:
        """The value of an expression over `server` in the process that serves."""
        self.say(expression)
        return json.loads(self.line())

    def until_held(self) -> None:
        """Until the server has the read that it keeps."""
        until(lambda: self.ask("len(server.held)"), "the read at the server")

    def __exit__(self, *_: object) -> None:
        for pid in (self.keeper, self.server):
            if pid:
                kill(pid)
        self.close()
        with raw.Control() as control, contextlib.suppress(FileNotFoundError, OSError):
            control.delete(self.id, by_path=bool(control_needs_path(self.id)))
        until(lambda: not os.path.exists(raw.CHAR_DEVICE.format(self.id)), "the device's end", 60)


def control_needs_path(number: int) -> bool:
    """Whether a device is an ordinary user's."""
    return os.stat(raw.CHAR_DEVICE.format(number)).st_uid != 0


@pytest.fixture
def for_users() -> Iterator[None]:
    """Ordinary users may make devices."""
    before = os.stat(raw.CONTROL).st_mode
    os.chmod(raw.CONTROL, 0o666)
    yield
    os.chmod(raw.CONTROL, before & 0o777)


def read_held(tasks: Tasks, path: str) -> list[int]:
    """Start a read that the server keeps; the list gets the errno that it ends with."""
    result: list[int] = []

    def read() -> None:
        with Disk(path, direct=True, read_only=True) as disk:
            result.append(error_of(lambda: disk.read(HELD, 4096)))

    tasks.start(read)
    return result


@pytest.mark.short
def test_a_completion_may_close_the_disk_last() -> None:
    """The last reference to a file goes with a completion, and writing back then needs the server."""
    with Server("Blocking", workers=2) as server, Aio() as aio:
        buffered = os.open(server.path, os.O_RDWR | os.O_CLOEXEC)
        direct = os.open(server.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        aio.read(direct, GATE, 4096)
        assert server.ask("disk.waiting.wait(10)") is True
        os.pwrite(buffered, b"dirty page", 0)
        os.close(buffered)
        os.close(direct)
        server.ask("disk.gate.set()")
        assert aio.result() == 4096
        until(lambda: server.ask("bytes(disk.data[:10]).decode()") == "dirty page", "the page at the server")


def test_a_completion_may_close_beside_a_partition_scan() -> None:
    """The same while the disk's open_mutex is held by a reader of partitions."""
    with Server("Blocking", workers=4) as server, Aio() as aio:
        tasks = Tasks()
        for _ in range(20):
            server.ask("disk.gate.clear()")
            server.ask("disk.waiting.clear()")
            direct = os.open(server.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            aio.read(direct, GATE, 4096)
            assert server.ask("disk.waiting.wait(10)") is True
            os.close(direct)
            tasks.start(read_partitions, server.path)
            server.ask("disk.gate.set()")
            assert aio.result() == 4096
            tasks.join()


@pytest.mark.io_errors
def test_a_close_that_hangs_delays_no_other_server() -> None:
    """The system closes files that a completion or a ring has let go of one after the other."""
    with (
        Server("ReadWrite", recoverable=True) as innocent,
        Server("StuckWrites", workers=4, recoverable=True) as stuck,
        Aio() as aio,
    ):
        buffered = os.open(stuck.path, os.O_RDWR | os.O_CLOEXEC)
        direct = os.open(stuck.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        aio.read(direct, GATE, 4096)
        assert stuck.ask("disk.waiting.wait(10)") is True
        os.pwrite(buffered, b"dirty page", 0)
        os.close(buffered)
        os.close(direct)
        stuck.ask("disk.gate.set()")
        assert aio.result() == 4096
        # The close waits for this write.
        assert stuck.ask("disk.wrote.wait(20)") is True
        with raw.Control() as control:
            for server in (innocent, stuck):
                server.kill()
                until(lambda id=server.id: control.info(id)["state"] == raw.QUIESCED, "QUIESCED", 30)
            for server in (stuck, innocent):
                control.delete(server.id)


@pytest.mark.io_errors
@pytest.mark.time_limit(180)
def test_a_users_disk_delays_no_other_close(for_users: None) -> None:
    """The system's work item for files that a completion has let go of must not wait for a user's server."""
    flags = raw.UNPRIVILEGED_DEV | raw.NO_AUTO_PART_SCAN
    with RawServer(flags=flags, uid=ALICE, hold_writes=True) as users, Server("Blocking") as other:
        udev.settle()
        with Aio() as aio:
            buffered = os.open(users.node, os.O_RDWR | os.O_CLOEXEC)
            direct = os.open(users.node, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            aio.read(direct, HELD, 4096)
            users.until_held()
            os.pwrite(buffered, b"dirty page", 0)
            os.close(buffered)
            os.close(direct)
            users.say("server.release()")
            assert aio.result() == 4096
        # The last close of the user's disk waits for a write, until its server is killed.
        with Aio() as aio, raw.Control() as control:
            direct = os.open(other.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            aio.read(direct, GATE, 4096)
            assert other.ask("disk.waiting.wait(10)") is True
            os.close(direct)
            other.ask("disk.gate.set()")
            assert aio.result() == 4096
            before = time.monotonic()
            until(lambda: try_stop(control, other.id), "the other disk's close", 60)
            waited = time.monotonic() - before
            assert is_running(users.server), f"the close took {waited:.0f} s, and the user's server has been killed"


def try_stop(control: raw.Control, number: int) -> bool:
    """Stop a disk that is not open. False if it is."""
    answer = error_of(lambda: control.command(raw.TRY_STOP_DEV, number))
    assert answer in (0, errno.EBUSY)
    return answer == 0


def read_partitions(path: str) -> None:
    with contextlib.suppress(OSError), open(path, "rb") as disk:
        fcntl.ioctl(disk, BLKRRPART)


@pytest.mark.long
@batch_or_not
@pytest.mark.io_errors
@pytest.mark.time_limit(180)
def test_a_dead_server_holds_nothing_up(mode: int) -> None:
    """Its child still has the char device open, which keeps the driver from cleaning up."""
    tasks = Tasks()
    with RawServer(flags=mode | raw.NO_AUTO_PART_SCAN, keeper=True) as server:
        result = read_held(tasks, server.node)
        server.until_held()
        kill(server.server)
        assert until(lambda: result, "the read's end", 3 * TIME_OUT) == [5]
    tasks.join()


@pytest.mark.long
@batch_or_not
@pytest.mark.io_errors
@pytest.mark.time_limit(180)
def test_a_users_server_cannot_hold_root_up(mode: int, for_users: None) -> None:
    """The process that opened the device is gone; the one that serves is known, and killed."""
    tasks = Tasks()
    with RawServer(flags=mode | raw.UNPRIVILEGED_DEV, uid=ALICE, in_child=True) as server:
        with raw.Control() as control:
            until(lambda: not is_running(server.pid), "the opener's end")
            assert control.info(server.id, by_path=True)["pid"] == server.server
        result = read_held(tasks, server.node)
        server.until_held()
        assert until(lambda: result, "the read's end", 3 * TIME_OUT) == [5]
        until(lambda: not is_running(server.server), "the server's end")
    tasks.join()


@pytest.mark.long
@pytest.mark.io_errors
@pytest.mark.time_limit(240)
@pytest.mark.parametrize("workers", [None, 2], ids=["queue", "workers"])
def test_a_killed_server_that_waits_for_its_own_disk_dies(workers: int | None) -> None:
    with Server("ReadsItself", workers=workers) as server:
        server.ask(f"disk.read_oneself({server.path!r}, {workers is None})")
        assert server.ask("disk.waiting.wait(10)") is True
        server.expect_end()
        server.signal(signal.SIGKILL)
        server.wait(3 * TIME_OUT)
    until(lambda: not os.path.exists(server.path), "the disk's end", 60)
    with raw.Control() as control:
        control.delete(server.id)


@batch_or_not
@pytest.mark.io_errors
@pytest.mark.time_limit(120)
def test_a_write_is_held_while_its_server_is_killed(mode: int) -> None:
    """The server's memory faults because it is killed, which says nothing about the write."""
    flags = mode | raw.USER_RECOVERY | raw.USER_RECOVERY_REISSUE | raw.NO_AUTO_PART_SCAN
    tasks = Tasks()
    result: list[int] = []

    def write(path: str) -> None:
        with Disk(path, direct=True) as disk:
            result.append(error_of(lambda: disk.write(0, b"x" * 4096)))

    with RawServer(flags=flags) as server:
        udev.settle()
        server.ask("server.make_unreachable()")
        tasks.start(write, server.node)
        # The thread is in the driver, where it waits for its memory.
        until(lambda: "handle_userfault" in stack_of(server.server), "the page fault")
        kill(server.server)
        with raw.Control() as control:
            until(lambda: control.info(server.id)["state"] == raw.QUIESCED, "QUIESCED", 30)
        assert result == []
    assert until(lambda: result, "the write's end") == [5]
    tasks.join()


class HangingFile(Child):
    """`hanging_file.py`, mounted in a place that users reach."""

    def __init__(self) -> None:
        self._directory = tempfile.mkdtemp()
        os.chmod(self._directory, 0o755)
        super().__init__([sys.executable, "-u", str(HERE / "hanging_file.py"), self._directory])
        self._mounted = self.line() == "mounted"
        self.path = f"{self._directory}/file"

    def close(self) -> None:
        """Reads that wait end with an error, and the file is gone."""
        super().close()
        if not self._mounted:
            return
        subprocess.run(["umount", "--lazy", self._directory], check=True)
        os.rmdir(self._directory)
        self._mounted = False


@pytest.mark.long
@batch_or_not
@pytest.mark.io_errors
@pytest.mark.time_limit(240)
@pytest.mark.parametrize("operation", ["read", "write"])
def test_a_page_fault_without_end_holds_no_client_up(mode: int, operation: str, for_users: None) -> None:
    """The driver copies a user's data from or to a file whose content never comes."""
    tasks = Tasks()
    result: list[int] = []

    def write(path: str) -> None:
        with Disk(path, direct=True) as disk:
            result.append(error_of(lambda: disk.write(0, b"x" * 4096)))

    flags = mode | raw.UNPRIVILEGED_DEV | raw.NO_AUTO_PART_SCAN
    with HangingFile() as file, RawServer(flags=flags, uid=ALICE) as server:
        udev.settle()
        if operation == "read":
            result = read_held(tasks, server.node)
            server.until_held()
        server.ask(f"server.use_file({file.path!r})")
        if operation == "write":
            tasks.start(write, server.node)
        else:
            server.say("server.release()")
        assert file.line(60) == "read"
        assert until(lambda: result, "the client's end", 3 * TIME_OUT) == [5]
        # The server cannot die before.
        file.close()
    tasks.join()


@batch_or_not
@pytest.mark.io_errors
@pytest.mark.time_limit(120)
def test_a_page_fault_without_end_holds_no_command_up(mode: int) -> None:
    """The server's thread has the lock of its ring, which idle commands are on."""
    tasks = Tasks()
    deleted: list[bool] = []

    def delete(number: int) -> None:
        with raw.Control() as control:
            control.command(raw.DEL_DEV_ASYNC, number)
        deleted.append(True)

    with HangingFile() as file, RawServer(flags=mode | raw.NO_AUTO_PART_SCAN) as server:
        udev.settle()
        result = read_held(tasks, server.node)
        server.until_held()
        server.ask(f"server.use_file({file.path!r})")
        server.say("server.release()")
        assert file.line(60) == "read"
        # It cannot die before.
        kill(server.server)
        tasks.start(delete, server.id)
        until(lambda: deleted and result, "the command's end", 60)
        assert result == [errno.EIO]
        file.close()
    tasks.join()


@pytest.mark.long
@batch_or_not
@pytest.mark.io_errors
@pytest.mark.time_limit(180)
def test_an_answer_in_parts_extends_no_users_time(mode: int, for_users: None) -> None:
    """A user's server answers each part of a read in time, and never the whole."""
    tasks = Tasks()
    with RawServer(flags=mode | raw.UNPRIVILEGED_DEV | raw.NO_AUTO_PART_SCAN, uid=ALICE) as server:
        udev.settle()
        result = read_held(tasks, server.node)
        parts = 0
        while not result and parts < 8:
            until(lambda: result or server.ask("len(server.held)"), "the rest of the read")
            time.sleep(TIME_OUT / 2)
            if not result:
                server.ask("server.release_part()")
                parts += 1
        assert result == [errno.EIO]
        assert parts <= 4
    tasks.join()


@pytest.mark.skipif(not has("BATCH_IO"), reason="Linux 7.0")
@pytest.mark.io_errors
@pytest.mark.time_limit(120)
def test_a_commit_that_waits_for_a_page_keeps_its_request() -> None:
    """Another thread's commit would let the tag go to a new request, which the first one would then write to."""
    tasks = Tasks()
    with HangingFile() as file, RawServer(flags=raw.BATCH_IO | raw.NO_AUTO_PART_SCAN) as server:
        udev.settle()
        result = read_held(tasks, server.node)
        server.until_held()
        server.ask(f"server.commit_in_thread({file.path!r})")
        assert file.line(60) == "read"
        assert server.ask("server.commit_again()") == -errno.EBUSY
        assert result == []
        file.close()
        assert until(lambda: result, "the client's end", 60) == [errno.EIO]
    tasks.join()


def stack_of(pid: int) -> str:
    """The kernel stacks of a process."""
    found = []
    for task in threads(pid):
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/task/{task}/stack").read_text())
    return "".join(found)


@pytest.mark.short
def test_a_device_is_known_when_it_is_announced() -> None:
    """Commands from a thread that has just seen the uevent, as udev's rules send them."""
    rounds = 100

    def delete_announced(next_event: Callable[[], str]) -> None:
        with raw.Control() as control:
            for _ in range(rounds):
                while not (found := re.search(r"add@\S*/ublkc(\d+)\0", next_event())):
                    pass
                number = int(found[1])
                assert control.info(number)["state"] == 0
                control.delete(number)

    tasks = Tasks()
    with kobject_events() as next_event, raw.Control() as control:
        thread = tasks.start(delete_announced, next_event)
        for _ in range(rounds):
            node = raw.CHAR_DEVICE.format(control.add(0, 1))
            until(lambda node=node: not os.path.exists(node) or not thread.is_alive(), "its deletion")
        tasks.join()


@contextlib.contextmanager
def kobject_events() -> Iterator[Callable[[], str]]:
    """Waits for the kernel's next uevent."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 15) as events:
        events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        events.bind((0, 1))
        events.settimeout(60)
        yield lambda: events.recv(8192).decode(errors="replace")


def test_commands_of_one_device_occupy_one_worker() -> None:
    """STOP_DEVs that all wait for the device's server."""
    tasks = Tasks()
    with RawServer(flags=raw.NO_AUTO_PART_SCAN) as server:
        result = read_held(tasks, server.node)
        server.until_held()
        for _ in range(8):
            # Each from a thread of its own: the kernel's workers for a thread's commands are few.
            tasks.start(stop_device, server.id)
        until(lambda: busy_workers() >= 1, "the first job")
        # None of the others has a worker, however long they wait: the device's is the only one.
        assert busy_workers() == 1
        assert server.ask("server.release()") == 1
        assert until(lambda: result, "the read's end") == [0]
        tasks.join()


def stop_device(number: int) -> None:
    with raw.Control() as control:
        control.command(raw.STOP_DEV, number)


def busy_workers() -> int:
    """Kernel workers that carry out jobs of the driver."""
    names = [path.read_text(errors="replace") for path in _comms() if path.exists()]
    return sum(bool(re.search(r"\+ublk\S*-job", name)) for name in names)


def _comms() -> list[Path]:
    return [Path("/proc", entry, "comm") for entry in os.listdir("/proc") if entry.isdigit()]


def as_user(uid: int, action: Callable[[], int]) -> int:
    """Runs an action in a child process of a user; returns what it returns, below 256."""
    child = os.fork()
    if child == 0:
        status = 255
        try:
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            status = action()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def add_until_refused(depth: int, wanted: int) -> Callable[[], int]:
    """Adds unprivileged devices; how many could be had, if the last error was the wanted one."""

    def add() -> int:
        with raw.Control() as control:
            for count in range(100):
                try:
                    control.add(raw.UNPRIVILEGED_DEV, depth, queues=2)
                except OSError as error:
                    return count if error.errno == wanted else 200
        return 201

    return add


def test_a_users_devices_count_as_locked_memory(for_users: None) -> None:
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (4 << 20, before[1]))
    try:
        first = as_user(ALICE, add_until_refused(1024, 12))
        assert 1 <= first <= 8
        delete_users_devices()
        # What was charged comes back.
        assert as_user(ALICE, add_until_refused(1024, 12)) == first
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)
        delete_users_devices()


def test_one_user_cannot_have_all_devices(for_users: None) -> None:
    limit = int(Path("/sys/module/ublk_drv/parameters/ublks_max_per_user").read_text())
    try:
        assert as_user(ALICE, add_until_refused(1, 13)) == limit
        assert as_user(BOB, add_until_refused(1, 13)) == limit
    finally:
        delete_users_devices()


def delete_users_devices() -> None:
    with raw.Control() as control:
        for entry in os.listdir("/sys/class/ublk-char"):
            number = int(entry.removeprefix("ublkc"))
            until(lambda number=number: os.path.exists(raw.CHAR_DEVICE.format(number)), "the node")
            control.delete(number, by_path=True)
