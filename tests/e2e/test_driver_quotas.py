# SPDX-License-Identifier: MIT OR Apache-2.0
"""How much of the machine one user can have with devices of his own."""

import ctypes
import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from support import driver, raw
from support.raw_device import ALICE, BOB, as_user
from support.waiting import until

PR_SET_DUMPABLE, CLONE_NEWUSER = 4, 0x10000000

libc = ctypes.CDLL(None, use_errno=True)
pytestmark = pytest.mark.skipif(not driver.is_bundled(), reason="about the driver of kmod/")


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
        first = as_user(ALICE, add_until_refused(1024, errno.ENOMEM))
        assert 1 <= first <= 8
        delete_users_devices()
        # What was charged comes back.
        assert as_user(ALICE, add_until_refused(1024, errno.ENOMEM)) == first
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)
        delete_users_devices()


def test_one_user_cannot_have_all_devices(for_users: None) -> None:
    limit = int(Path("/sys/module/ublk_drv/parameters/ublks_max_per_user").read_text())
    try:
        assert as_user(ALICE, add_until_refused(1, errno.EACCES)) == limit
        assert as_user(BOB, add_until_refused(1, errno.EACCES)) == limit
    finally:
        delete_users_devices()


def as_subordinate(user: int, number: int, action: Callable[[], int], users: str | None = None) -> int:
    """Runs an action as the number-th user of a user namespace that a user has made.

    Its users are the user and some subordinate ones, as `newuidmap` allows it, or those of the lines `users`.
    """
    users = users or f"0 {user} 1\n1 100000 65536\n"
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        status = 255
        try:
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
            assert libc.unshare(CLONE_NEWUSER) == 0
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            os.setresgid(number, number, number)
            os.setresuid(number, number, number)
            status = action()
        finally:
            os._exit(status)
    os.close(ready[1])
    assert os.read(ready[0], 1), "no user namespace"
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{child}/{name}").write_text(users)
    os.write(go[1], b"x")
    for fd in (ready[0], *go):
        os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_subordinate_users_share_their_users_quota(for_users: None) -> None:
    limit = int(Path("/sys/module/ublk_drv/parameters/ublks_max_per_user").read_text())
    try:
        counts = [as_subordinate(ALICE, number, add_until_refused(1, errno.EACCES)) for number in (1, 2)]
        assert counts == [limit, 0]
        assert as_user(BOB, add_until_refused(1, errno.EACCES)) == limit
    finally:
        delete_users_devices()


def test_users_of_a_container_of_root_share_a_quota(for_users: None) -> None:
    """Also if it is started again, when its user namespace is another one with the same users."""
    limit = int(Path("/sys/module/ublk_drv/parameters/ublks_max_per_user").read_text())
    try:
        counts = [
            as_subordinate(0, number, add_until_refused(1, errno.EACCES), f"0 {first} 65536\n")
            for first, number in ((200000, 1), (200000, 2), (300000, 1))
        ]
        assert counts == [limit, 0, limit]
        assert as_user(BOB, add_until_refused(1, errno.EACCES)) == limit
    finally:
        delete_users_devices()


def delete_users_devices() -> None:
    with raw.Control() as control:
        for entry in os.listdir("/sys/class/ublk-char"):
            number = int(entry.removeprefix("ublkc"))
            until(lambda number=number: os.path.exists(raw.CHAR_DEVICE.format(number)), "the node")
            control.delete(number, by_path=True)
