# SPDX-License-Identifier: MIT OR Apache-2.0

"""Mistakes in block devices, which are found when they are made."""

import builtins
import dataclasses
import logging
import subprocess
import sys
import threading
import time
import types

import numpy
import pytest

import ublk
from ublk import _log, testing

SIZE = 1 << 20


class Disk(ublk.BlockDevice):
    def read(self, offset, buf):
        buf[:] = bytes(len(buf))


def test_sizes_may_be_any_integers(driver):
    disk = Disk(size=numpy.int64(SIZE), block_size=numpy.uint16(4096))
    assert type(disk.size) is int
    with disk.start(queues=numpy.int8(1), depth=numpy.int8(4), id=numpy.int64(7)) as device:
        assert (device.size, device.block_size, device.depth, device.id) == (SIZE, 4096, 4, 7)


@pytest.mark.parametrize("size", [True, 1.5, "1", None, numpy.float64(512)])
def test_what_is_no_integer_is_no_size(size):
    with pytest.raises(TypeError, match="size must be an int, not"):
        Disk(size=size)


@pytest.mark.parametrize(
    "shape",
    [
        {"size": 1000},
        {"size": 0},
        {"size": -512},
        {"size": SIZE, "block_size": 1000},
        {"size": SIZE, "physical_block_size": 3},
        {"size": SIZE, "max_io_bytes": 100},
        {"size": SIZE, "zone_size": 1000},
    ],
)
def test_a_shape_that_cannot_be_is_refused_when_it_is_given(shape):
    with pytest.raises(ValueError, match=r"\d"):
        Disk(**shape)


@pytest.mark.parametrize(
    "options",
    [
        {"queues": 0},
        {"depth": 5000},
        {"id": 1 << 20},
        {"workers": 0},
        {"coalesce_usecs": 10_001},
        {"recoverable": "sometimes"},
        {"recoverable": True, "shared_memory": True},
    ],
)
def test_options_are_checked_before_the_driver_is_looked_for(options):
    # There is none here, or it is unknown.
    with pytest.raises(ValueError, match=r"must be|at most|recover|workers|shared memory"):
        Disk(size=SIZE).start(**options)


def test_a_dataclass_is_told_what_it_lacks():
    @dataclasses.dataclass
    class Data(Disk):
        size: int

    with pytest.raises(TypeError, match=r"super\(\).__init__.*__post_init__"):
        testing.open(Data(SIZE))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("trim", "discard"),
        ("zero", "write_zeroes"),
        ("write_zeros", "write_zeroes"),
        ("flsh", "flush"),
        ("fsync", "flush"),
    ],
)
def test_a_misspelt_method_is_warned_of(name, meant):
    kind = type("Misspelt", (Disk,), {name: lambda self, offset, length: None})
    with pytest.warns(UserWarning, match=rf"Misspelt.{name} is never called by ublk: is it meant to be {meant}\(\)"):
        testing.open(kind(size=SIZE)).close()


def test_methods_with_names_of_their_own_are_nobody_s_business():
    class Mixin:
        def sync(self):
            pass

    class Own(Mixin, Disk):
        trim = property(lambda self: 1)

        def reads(self):
            pass

        def close(self):
            pass

        def write(self, offset, buf):
            pass

        def discard(self, offset, length):
            pass

        def unmap(self):
            pass

    testing.open(Own(size=SIZE)).close()


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("read", lambda self, buf: None),
        ("write", lambda self, offset: None),
        ("flush", lambda self, force: None),
        ("discard", lambda self, offset, length, more: None),
        ("map", lambda self, offset, length: None),
    ],
)
def test_a_method_that_cannot_be_called_is_a_type_error_at_start(name, method):
    kind = type("Wrong", (Disk,), {name: method})
    with pytest.raises(TypeError, match=rf"Wrong\.{name}\(.*\) cannot be called as {name}\("):
        testing.open(kind(size=SIZE))


def test_methods_may_take_what_they_like_besides():
    class Own(ublk.BlockDevice):
        def read(self, at, into, /, *, mode=1):
            into[:] = b"r" * len(into)

        def write(self, *anything):
            pass

        def discard(self, first, count, flags=0):
            pass

    with testing.open(Own(size=SIZE)) as file:
        assert file.pread(0, 1) == b"r"


def test_an_object_whose_call_is_a_coroutine_serves_as_one():
    class Reader:
        async def __call__(self, offset, buf):
            buf[:] = b"c" * len(buf)

    disk = ublk.BlockDevice(size=SIZE)
    disk.read = Reader()
    with testing.open(disk) as file:
        assert file.pread(0, 4) == b"cccc"


def test_a_star_import_shadows_no_builtin():
    assert set(ublk.__all__).isdisjoint(dir(builtins))


@pytest.mark.parametrize("call", ["start_async", "wait_async", "stop_async"])
def test_a_loop_of_trio_is_named(call, monkeypatch):
    class Tasks(ublk.BlockDevice):
        async def read(self, offset, buf):
            buf[:] = bytes(len(buf))

    lowlevel = types.SimpleNamespace(in_trio_run=lambda: True)
    monkeypatch.setitem(sys.modules, "trio", types.SimpleNamespace(lowlevel=lowlevel))
    with testing.open(Tasks(size=SIZE)) as file:
        coroutine = getattr(Tasks(size=SIZE) if call == "start_async" else file.device, call)()
        with pytest.raises(RuntimeError, match=rf"{call} needs a running event loop of asyncio, but this is trio"):
            coroutine.send(None)


class Fails(Disk):
    def read(self, offset, buf):
        raise ValueError("a mistake")


def test_failures_are_logged_at_a_limited_rate_with_a_count(caplog):
    with testing.open(Fails(size=SIZE)) as file:
        for _ in range(1000):
            with pytest.raises(OSError):
                file.pread(0, 512)
    assert len(caplog.records) == _log.BURST + 1
    assert caplog.records[0].exc_info
    assert "Fails.read (ValueError) failed 997 more times" in caplog.records[-1].getMessage()


def test_what_was_not_logged_is_counted_in_the_next_report(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    limiter = _log.Limiter()
    assert [limiter.admit("a") for _ in range(_log.BURST + 5)] == [0] * _log.BURST + [None] * 5
    assert limiter.admit("b") == 0
    now[0] = _log.INTERVAL
    assert limiter.admit("a") == 5
    assert limiter.admit("a") == 0
    assert limiter.rest() == {}
    for number in range(10_000):
        limiter.admit(number)
    assert len(limiter._seen) <= 256


def test_a_finalizer_may_report_while_something_is_counted():
    class Key:
        def __hash__(self):
            limiter.admit("inner")
            return 1

    limiter = _log.Limiter()
    assert limiter.admit(Key()) == 0


def test_a_log_handler_that_raises_fails_no_request_and_kills_no_watchdog(driver, capsys):
    class Raises(logging.Handler):
        def emit(self, record):
            raise SystemError("mine")

    class Slow(Disk):
        def read(self, offset, buf):
            go.wait(20)
            raise ValueError("a mistake")

    handler, go = Raises(), threading.Event()
    logging.getLogger("ublk").addHandler(handler)
    try:
        with Slow(size=SIZE).start(hang_timeout=0.05, workers=2) as device:
            clients = [threading.Thread(target=pytest.raises, args=(OSError, driver.read, 0, 0, 512)) for _ in "ab"]
            for client in clients:
                client.start()
            time.sleep(0.5)
            go.set()
            for client in clients:
                client.join(10)
            assert device.running
    finally:
        logging.getLogger("ublk").removeHandler(handler)
    assert "mine" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", [float("inf"), 1e300])
def test_a_wait_without_end_is_no_end_of_the_watchdog(driver, seconds):
    with Disk(size=SIZE).start(hang_timeout=seconds), Disk(size=SIZE).start():
        time.sleep(0.1)
        assert any(thread.name == "ublk-watch" for thread in threading.enumerate())


def test_a_start_without_memory_fails_with_enomem():
    code = """
import errno, resource
from ublk import testing, BlockDevice

class Disk(BlockDevice):
    def read(self, offset, buf):
        pass

resource.setrlimit(resource.RLIMIT_AS, (600 << 20,) * 2)
try:
    testing.open(Disk(size=1 << 20), depth=4096)
except OSError as error:
    print(errno.errorcode[error.errno], error)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout.startswith("ENOMEM [Errno 12] queue 0 of device 0: 4096 buffers"), ended
