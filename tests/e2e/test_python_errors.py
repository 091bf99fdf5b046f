# SPDX-License-Identifier: MIT OR Apache-2.0
"""Handlers that fail, return nonsense or misuse their buffer: the request fails, the device lives on."""

import errno
import re

import pytest
from support.blockio import Disk, error_of
from support.server import Server

pytestmark = pytest.mark.io_errors

LOGGED = "Traceback"


def lives_on(disk: Disk) -> None:
    """The device still stores data."""
    disk.write(8192, b"\x5c" * 4096)
    assert disk.read(8192, 4096) == b"\x5c" * 4096


ERRNOS = {
    "OSError(errno.ENOSPC, 'full')": errno.ENOSPC,
    "OSError(errno.EREMOTEIO, 'far away')": errno.EREMOTEIO,
    "OSError(errno.ENODATA, 'bad medium')": errno.ENODATA,
    "OSError(errno.EILSEQ, 'wrong checksum')": errno.EILSEQ,
    "NotImplementedError()": errno.EOPNOTSUPP,
    "TimeoutError()": errno.ETIMEDOUT,
    "MemoryError()": errno.ENOMEM,
    # The block layer has no word for these.
    "FileNotFoundError(errno.ENOENT, 'gone')": errno.EIO,
    "PermissionError(errno.EPERM, 'no')": errno.EIO,
}


@pytest.mark.parametrize("operation", ["read", "write"])
def test_an_exception_with_an_errno_reaches_who_asked(operation: str) -> None:
    with Server("Failing") as server, Disk(server.path, direct=True) as disk:
        action = {"read": lambda: disk.read(0, 4096), "write": lambda: disk.write(0, bytes(4096))}[operation]
        found = {}
        for raised in ERRNOS:
            server.ask(f"disk.fail({operation!r}, {raised!r})")
            found[raised] = error_of(action)
        assert found == ERRNOS
        server.ask("disk.fail('', 'None')")
        lives_on(disk)
        assert LOGGED not in server.log, "an errno is an answer, not an accident"


@pytest.mark.parametrize(
    "operation",
    ["read", "flush", *(pytest.param(name, marks=pytest.mark.long) for name in ("write", "discard", "write_zeroes"))],
)
def test_any_other_exception_is_eio_and_logged_with_its_traceback(operation: str) -> None:
    with Server("Failing") as server, Disk(server.path, direct=True) as disk:
        server.ask(f"disk.fail({operation!r}, \"RuntimeError('what went wrong')\")")
        actions = {
            "read": lambda: disk.read(0, 4096),
            "write": lambda: disk.write(0, bytes(4096)),
            "flush": disk.sync,
            "discard": lambda: disk.discard(0, 4096),
            "write_zeroes": lambda: disk.punch(0, 4096),
        }
        assert error_of(actions[operation]) == errno.EIO
        server.ask("disk.fail('', 'None')")
        lives_on(disk)
        log = server.log
        assert re.search(rf"^ERROR:ublk:.*Failing\.{operation}", log, re.MULTILINE), log
        assert LOGGED in log, log
        assert "RuntimeError: what went wrong" in log, log
        assert "disks.py" in log, log


@pytest.mark.parametrize("operation", ["flush", "discard"])
def test_an_errno_of_an_operation_without_data_reaches_the_caller(operation: str) -> None:
    with Server("Failing") as server, Disk(server.path, direct=True) as disk:
        server.ask(f"disk.fail({operation!r}, \"OSError(errno.ENOSPC, 'full')\")")
        action = disk.sync if operation == "flush" else lambda: disk.discard(0, 4096)
        assert error_of(action) == errno.ENOSPC
        server.ask("disk.fail('', 'None')")
        lives_on(disk)


def test_an_error_without_an_errno_is_eio() -> None:
    with Server("Failing") as server, Disk(server.path, direct=True) as disk:
        server.ask("disk.fail('read', \"OSError('no number')\")")
        assert error_of(lambda: disk.read(0, 4096)) == errno.EIO
        server.ask("disk.fail('', 'None')")
        lives_on(disk)


def test_an_errno_that_is_none_is_eio() -> None:
    # In particular it must not be success, nor a number of bytes.
    with Server("Failing") as server, Disk(server.path, direct=True) as disk:
        for number in ("0", "-5", "10**6", "2**70", "'text'", "None"):
            server.ask(f"disk.fail('read', \"OSError({number}, 'odd')\")")
            assert error_of(lambda: disk.read(0, 4096)) == errno.EIO, number
        server.ask("disk.fail('', 'None')")
        lives_on(disk)


def test_one_failing_request_does_not_fail_its_neighbours() -> None:
    with Server("Failing") as server, Disk(server.path, direct=True) as disk:
        disk.write(0, b"\x21" * 65536)
        server.ask("disk.fail('write', \"ValueError('no')\")")
        for _ in range(50):
            assert error_of(lambda: disk.write(0, bytes(4096))) == errno.EIO
            assert disk.read(0, 65536) == b"\x21" * 65536


WRONG = [
    *("'abc'", "3.5", "[]", "b'x' * 512", "object()", "lambda buf: len(buf) - 1", "lambda buf: len(buf) + 1"),
    *("0", "-1", "2**70", "lambda buf: buf"),
]


def test_a_wrong_return_value_is_eio_and_logged() -> None:
    with Server("Answering") as server, Disk(server.path, direct=True) as disk:
        for value in WRONG:
            server.ask(f"disk.answer({value!r})")
            assert error_of(lambda: disk.read(0, 4096)) == errno.EIO, value
            assert error_of(lambda: disk.write(0, bytes(4096))) == errno.EIO, value
        # The first ones; what goes on is counted.
        for method in ("read", "write"):
            assert re.search(rf"ERROR:ublk:.*Answering\.{method}", server.log), method
        server.ask("disk.answer('None')")
        lives_on(disk)


def test_the_number_of_bytes_may_be_returned() -> None:
    with Server("Exact") as server, Disk(server.path, direct=True) as disk:
        lives_on(disk)
        disk.write(512, b"\x77" * 131072)
        assert disk.read(512, 131072) == b"\x77" * 131072


@pytest.mark.parametrize("how", ["wrong length", "writes to what it was given to read"])
def test_misuse_of_the_buffer_is_eio(how: str) -> None:
    with Server("Meddling", how=how) as server, Disk(server.path, direct=True) as disk:
        action = (lambda: disk.read(0, 4096)) if how == "wrong length" else (lambda: disk.write(0, bytes(4096)))
        assert error_of(action) == errno.EIO
        assert LOGGED in server.log
        # The others still work.
        other = (lambda: disk.write(0, bytes(4096))) if how == "wrong length" else (lambda: disk.read(0, 4096))
        assert error_of(other) == 0


def test_a_handler_may_release_its_buffer_itself() -> None:
    with Server("Meddling", how="released") as server, Disk(server.path, direct=True) as disk:
        for _ in range(3):
            lives_on(disk)


@pytest.mark.parametrize("raised", ["SystemExit(7)", "KeyboardInterrupt()", "GeneratorExit()"])
def test_an_exception_that_is_no_error_ends_the_device_in_good_order(raised: str) -> None:
    with Server("Failing") as server:
        with Disk(server.path, direct=True) as disk:
            server.ask(f"disk.fail('read', {raised!r})")
            assert error_of(lambda: disk.read(0, 4096)) == errno.EIO
        assert server.ask("wait_for(lambda: not dev.running)") is True
        # The thread that waits for the device gets the exception.
        assert server.ask("caught(dev.wait)") == raised.partition("(")[0]


def test_prints_of_a_handler_disturb_nothing() -> None:
    with Server("Prints") as server, Disk(server.path, direct=True) as disk:
        lives_on(disk)
        assert "reading 8192" in server.log
