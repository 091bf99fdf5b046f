# SPDX-License-Identifier: MIT OR Apache-2.0
"""What clients and servers can do to the driver of kmod/ without hanging anything or anyone else.

Each test is a fault that the driver had. The servers speak the protocol themselves (`raw_server.py`) where the engine
would not do such a thing.
"""

import contextlib
import errno
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import driver, raw, udev
from support.blockio import Disk, Tasks, error_of
from support.features import has
from support.processes import is_running, kernel_stacks, kill
from support.raw_device import ALICE, TIME_OUT, FailingAdd, HangingFile, RawServer, read_held
from support.server import Server
from support.waiting import until

pytestmark = pytest.mark.skipif(not driver.is_bundled(), reason="about the driver of kmod/")
batch_or_not = pytest.mark.parametrize(
    "mode",
    [
        pytest.param(0, id="single"),
        pytest.param(raw.BATCH_IO, id="batch", marks=pytest.mark.skipif(not has("BATCH_IO"), reason="Linux 7.0")),
    ],
)


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
        until(lambda: "handle_userfault" in kernel_stacks(server.server), "the page fault")
        kill(server.server)
        with raw.Control() as control:
            until(lambda: control.info(server.id)["state"] == raw.QUIESCED, "QUIESCED", 30)
        assert result == []
    assert until(lambda: result, "the write's end") == [5]
    tasks.join()


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
        began = time.monotonic()
        result = read_held(tasks, server.node)
        parts = 0
        while not result and parts < 8:
            until(lambda: result or server.ask("len(server.held)"), "the rest of the read")
            time.sleep(TIME_OUT / 2)
            if not result:
                server.ask("server.release_part()")
                parts += 1
        assert result == [errno.EIO]
        assert parts <= 2
        assert time.monotonic() - began < 2 * TIME_OUT
    tasks.join()


@pytest.mark.long
@pytest.mark.skipif(not has("BATCH_IO"), reason="Linux 7.0")
@pytest.mark.io_errors
@pytest.mark.time_limit(180)
def test_a_dead_server_that_fetched_nothing_holds_nothing_up() -> None:
    """It has prepared its tags, so that requests come; its child has the char device open."""
    tasks = Tasks()
    flags = raw.BATCH_IO | raw.NO_AUTO_PART_SCAN
    with RawServer(flags=flags, keeper=True, prepare_only=True) as server:
        result = read_held(tasks, server.node)
        kill(server.server)
        assert until(lambda: result, "the read's end", 3 * TIME_OUT) == [errno.EIO]
    tasks.join()


@pytest.mark.long
@pytest.mark.io_errors
@pytest.mark.time_limit(180)
def test_quiesce_ends_when_requests_are_taken_back() -> None:
    """All tags are with a dead server whose child has the char device open."""
    flags = raw.USER_RECOVERY | raw.USER_RECOVERY_REISSUE | raw.NO_AUTO_PART_SCAN | raw.QUIESCE
    tasks = Tasks()
    with RawServer(flags=flags, depth=1, keeper=True) as server:
        udev.settle()
        read_held(tasks, server.node)
        server.until_held()
        quiescing = tasks.start(quiesce_device, server.id)
        until(lambda: "ublk_quiesce_dev" in kernel_stacks(os.getpid()), "QUIESCE_DEV's wait")
        kill(server.server)
        until(lambda: not quiescing.is_alive(), "the end of QUIESCE_DEV", 3 * TIME_OUT)
    tasks.join()


def quiesce_device(number: int) -> None:
    with raw.Control() as control:
        control.command(raw.QUIESCE_DEV, number)


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


@pytest.mark.io_errors
@pytest.mark.time_limit(120)
def test_a_killed_add_waits_for_no_server() -> None:
    """ADD_DEV cannot return its result and removes the device, which has a server that does not answer by then."""
    number, flags = 1000, raw.NO_AUTO_PART_SCAN
    tasks = Tasks()
    with FailingAdd(number, flags) as adding:
        # The device exists, and the driver waits for the memory that the result goes to.
        until(lambda: "handle_userfault" in kernel_stacks(adding.pid), "ADD_DEV's result")
        with RawServer(serves=number, flags=flags) as server:
            udev.settle()
            result = read_held(tasks, server.node)
            server.until_held()
            stopping = tasks.start(stop_device, number)
            until(lambda: busy_workers() >= 1, "the job of STOP_DEV")
            adding.fail()
            until(lambda: "handle_userfault" not in kernel_stacks(adding.pid), "the failure of ADD_DEV")
            kill(adding.pid)
            until(lambda: not is_running(adding.pid), "the end of ADD_DEV's sender")
            assert stopping.is_alive()
            assert server.ask("server.release()") == 1
            assert until(lambda: result, "the read's end") == [0]
            # Without its sender the device is removed all the same.
            until(lambda: not os.path.exists(f"/sys/class/ublk-char/ublkc{number}"), "the device's end", 30)
    tasks.join()


def busy_workers() -> int:
    """Kernel workers that carry out jobs of the driver."""
    names = [path.read_text(errors="replace") for path in _comms() if path.exists()]
    return sum(bool(re.search(r"\+ublk\S*-job", name)) for name in names)


def _comms() -> list[Path]:
    return [Path("/proc", entry, "comm") for entry in os.listdir("/proc") if entry.isdigit()]
