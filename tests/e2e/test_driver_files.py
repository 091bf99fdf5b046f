# SPDX-License-Identifier: MIT OR Apache-2.0
"""Closes of a disk that wait for its server, and what must not wait for them.

The system releases files one after the other that a completion or a ring has let go of.
"""

import contextlib
import errno
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import driver, raw, udev
from support.aio import Aio
from support.blockio import Tasks, error_of
from support.gate import GATE
from support.processes import is_running, kill
from support.raw_device import ALICE, HELD, TIME_OUT, HangingFile, RawServer
from support.server import HERE, Child, Server
from support.waiting import until

BLKRRPART = 0x125F
# A server of this long ago would have been killed for a request that it does not answer.
LONGER = TIME_OUT * 1.3
# The interval at which the driver looks after closes that wait, in debug builds.
REAP_MS = Path("/sys/module/ublk_drv/parameters/reap_ms")

pytestmark = pytest.mark.skipif(not driver.is_bundled(), reason="about the driver of kmod/")


def hold_read(server: Server, aio: Aio) -> int:
    """Have a disk of `Blocking` keep a read until `disk.gate` is set; return the descriptor that it came by."""
    direct = os.open(server.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    aio.read(direct, GATE, 4096)
    assert server.ask("disk.waiting.wait(10)") is True
    return direct


def hold_raw_read(server: RawServer, aio: Aio) -> int:
    """Have a server keep a read until `server.release()`; return the descriptor that it came by."""
    direct = os.open(server.node, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    aio.read(direct, HELD, 4096)
    server.until_held()
    return direct


def close_with_dirty_page(path: str, hold: Callable[[], int]) -> None:
    """Close a disk with a dirty page. The read that `hold` starts has the last reference to it."""
    buffered = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    direct = hold()
    os.pwrite(buffered, b"dirty page", 0)
    os.close(buffered)
    os.close(direct)


@pytest.mark.short
def test_a_completion_may_close_the_disk_last() -> None:
    """The last reference to a file goes with a completion, and writing back then needs the server."""
    with Server("Blocking", workers=2) as server, Aio() as aio:
        close_with_dirty_page(server.path, lambda: hold_read(server, aio))
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
            os.close(hold_read(server, aio))
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
        close_with_dirty_page(stuck.path, lambda: hold_read(stuck, aio))
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


def close_with_io_in_flight(server: RawServer, aio: Aio) -> None:
    """Close a disk with a dirty page. A read that the server keeps has the last reference to it."""
    close_with_dirty_page(server.node, lambda: hold_raw_read(server, aio))


@pytest.mark.io_errors
@pytest.mark.time_limit(180)
def test_a_users_disk_delays_no_other_close(for_users: None) -> None:
    """The system's work item for files that a completion has let go of must not wait for a user's server."""
    flags = raw.UNPRIVILEGED_DEV | raw.NO_AUTO_PART_SCAN
    with RawServer(flags=flags, uid=ALICE, hold_writes=True) as users, Server("Blocking") as other:
        udev.settle()
        with Aio() as aio:
            close_with_io_in_flight(users, aio)
            users.say("server.release()")
            assert aio.result() == 4096
        # The last close of the user's disk waits for a write, until its server is killed.
        waited = seconds_until_closed(other)
        assert is_running(users.server), f"the close took {waited:.0f} s, and the user's server has been killed"


def seconds_until_closed(other: Server) -> float:
    """Have a completion close a disk of `Blocking` last, and stop it; how long after the completion it was closed."""
    with Aio() as aio, raw.Control() as control:
        os.close(hold_read(other, aio))
        other.ask("disk.gate.set()")
        assert aio.result() == 4096
        before = time.monotonic()
        until(lambda: try_stop(control, other.id), "the other disk's close", 60)
        return time.monotonic() - before


@pytest.fixture
def short_reap_interval() -> Iterator[None]:
    """The driver looks after closes that wait at each tick of the timer, so that a minute is like hours."""
    before = REAP_MS.read_text()
    REAP_MS.write_text("1")
    yield
    REAP_MS.write_text(before)


@pytest.mark.long
@pytest.mark.skipif(not REAP_MS.exists(), reason="a parameter of the driver's debug builds")
@pytest.mark.io_errors
@pytest.mark.time_limit(240)
def test_a_users_slow_close_never_exhausts_the_driver(for_users: None, short_reap_interval: None) -> None:
    """The close waits for many writes, each of which the user's server answers just in time."""
    flags = raw.UNPRIVILEGED_DEV | raw.NO_AUTO_PART_SCAN
    with RawServer(flags=flags, uid=ALICE, hold_writes=True) as users, Server("Blocking") as other:
        udev.settle()
        with Aio() as aio:
            buffered = os.open(users.node, os.O_RDWR | os.O_CLOEXEC)
            direct = hold_raw_read(users, aio)
            # Never two of them in one request.
            for page in range(0, 4000, 2):
                os.pwrite(buffered, b"dirty page", page * 4096)
            os.close(buffered)
            os.close(direct)
            assert users.ask("server.release()") == 1
            assert aio.result() == 4096
        # 80 s are 20,000 ticks: as much as 5.5 hours at the ordinary interval.
        for _ in range(8):
            time.sleep(10)
            assert users.ask("server.release_writes()") > 0
        seconds_until_closed(other)
        assert is_running(users.server)
        until(lambda: users.ask("server.release_writes()"), "a write that the close still waits for")


def try_stop(control: raw.Control, number: int, *, by_path: bool = False) -> bool:
    """Stop a disk that is not open. False if it is."""
    answer = error_of(lambda: control.command(raw.TRY_STOP_DEV, number, by_path=by_path))
    assert answer in (0, errno.EBUSY)
    return answer == 0


def read_partitions(path: str) -> None:
    with contextlib.suppress(OSError), open(path, "rb") as disk:
        fcntl.ioctl(disk, BLKRRPART)


@pytest.mark.long
@pytest.mark.time_limit(180)
def test_a_last_close_never_waits_in_a_users_server(for_users: None) -> None:
    """The server answers everything at once, so that it must not be killed for a request that it cannot answer."""
    flags = raw.UNPRIVILEGED_DEV | raw.NO_AUTO_PART_SCAN
    with RawServer(flags=flags, uid=ALICE) as server:
        udev.settle()
        with Aio() as aio:
            close_with_io_in_flight(server, aio)
            server.say("server.release()")
            assert aio.result() == 4096
        time.sleep(LONGER)
        assert is_running(server.server)


@pytest.mark.io_errors
@pytest.mark.time_limit(180)
def test_a_users_server_cannot_keep_a_clients_file_open(for_users: None) -> None:
    """It answers the client's last read in a system call that does not return, not even when it is killed."""
    flags = raw.UNPRIVILEGED_DEV | raw.NO_AUTO_PART_SCAN
    with HangingFile() as file, RawServer(flags=flags, uid=ALICE) as server, Aio() as aio, raw.Control() as control:
        udev.settle()
        os.close(hold_raw_read(server, aio))
        server.say(f"server.release_and_hang({file.path!r})")
        assert aio.result() == 4096
        assert file.line(60) == "read"
        try:
            kill(server.server)
            until(lambda: try_stop(control, server.id, by_path=True), "the release of the client's file", 60)
        finally:
            file.close()


@pytest.mark.io_errors
@pytest.mark.time_limit(180)
def test_a_server_that_fetched_nothing_delays_no_recovery() -> None:
    """Its char device is released after a close of the disk that waits for the server to come."""
    flags = raw.USER_RECOVERY | raw.USER_RECOVERY_REISSUE | raw.NO_AUTO_PART_SCAN
    with RawServer(flags=flags, hold_writes=True) as server, Aio() as aio, raw.Control() as control:
        udev.settle()
        close_with_io_in_flight(server, aio)
        assert server.ask("server.release()") == 1
        assert aio.result() == 4096
        until(lambda: server.ask("len(server.stuck)"), "the write that the close waits for")
        kill(server.server)
        until(lambda: control.info(server.id)["state"] == raw.QUIESCED, "QUIESCED", 60)
        control.command(raw.START_USER_RECOVERY, server.id)
        with Child(
            [sys.executable, "-u", str(HERE / "raw_server.py"), json.dumps({"only_opens": server.id})]
        ) as second:
            assert second.line() == "open"
            kill(second.pid)
        until(
            lambda: error_of(lambda: control.command(raw.START_USER_RECOVERY, server.id)) == 0,
            "a disk that can be recovered",
            60,
        )


@pytest.mark.io_errors
@pytest.mark.time_limit(180)
def test_a_disk_without_a_server_delays_no_other_close() -> None:
    """A close of a recoverable disk waits for its next server, in the system's work item."""
    flags = raw.USER_RECOVERY | raw.USER_RECOVERY_REISSUE | raw.NO_AUTO_PART_SCAN
    with RawServer(flags=flags, hold_writes=True) as quiesced, Server("Blocking") as other, raw.Control() as control:
        udev.settle()
        with Aio() as aio:
            close_with_io_in_flight(quiesced, aio)
            assert quiesced.ask("server.release()") == 1
            assert aio.result() == 4096
        until(lambda: quiesced.ask("len(server.stuck)"), "the write that the close waits for")
        kill(quiesced.server)
        # The driver has cleaned up after the server.
        until(
            lambda: error_of(lambda: control.command(raw.START_USER_RECOVERY, quiesced.id)) == 0,
            "a disk that can be recovered",
            60,
        )
        seconds_until_closed(other)
        assert control.info(quiesced.id)["state"] == raw.QUIESCED
