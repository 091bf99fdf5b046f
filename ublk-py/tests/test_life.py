# SPDX-License-Identifier: MIT OR Apache-2.0

"""Starting and ending devices; values that cannot be."""

import asyncio
import concurrent.futures
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import ublk
from ublk import ZoneCondition, _interval, _lifecycle, _signals, _threads, _watchdog
from ublk._driver import using
from ublk._ublk import FakeDriver
from ublk._zones import reporter

SIZE = 1 << 20


class Disk(ublk.BlockDevice):
    """A disk that can only be read."""

    def read(self, offset, buf):
        buf[:] = bytes(len(buf))


def test_the_device_tells_what_it_is(driver):
    with Disk(size=SIZE, block_size=4096, max_io_bytes=65536).start(queues=2, depth=7, id=5) as dev:
        assert (dev.id, dev.queues, dev.depth, dev.size, dev.block_size) == (5, 2, 7, SIZE, 4096)
        assert dev.max_io_bytes == 65536
        assert dev.path.endswith("ublkb5")
        assert dev.running
        assert "Disk" in repr(dev)
    assert not dev.running


def test_leaving_the_block_by_an_exception_ends_the_device(driver):
    with pytest.raises(RuntimeError, match="mine"), Disk(size=SIZE).start():
        raise RuntimeError("mine")
    assert driver.devices() == []


def test_stop_may_be_called_again_and_from_any_thread(driver):
    dev = Disk(size=SIZE).start()
    threads = [threading.Thread(target=dev.stop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    dev.stop()
    assert not dev.running


def test_wait_ends_with_the_device(driver):
    dev = Disk(size=SIZE).start()
    assert dev.wait(0.05) is False
    stopper = threading.Timer(0.1, dev.stop)
    stopper.start()
    assert dev.wait(10) is True
    stopper.join()


def test_a_failed_start_leaves_nothing(driver):
    with Disk(size=SIZE).start(id=3):
        with pytest.raises(ublk.UblkError, match="the id is in use") as caught:
            Disk(size=SIZE).start(id=3)
        assert isinstance(caught.value, FileExistsError | OSError)
        assert caught.value.errno == 17
        assert driver.devices() == [3]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"size": 0}, "size = 0"),
        ({"size": 1000}, "size = 1000"),
        ({"size": -512}, "size = -512"),
        ({"size": SIZE, "block_size": 1000}, "logical block size = 1000"),
        ({"size": SIZE, "block_size": 0}, "logical block size = 0"),
        ({"size": SIZE, "block_size": 8192}, "logical block size = 8192"),
        ({"size": SIZE, "physical_block_size": 256}, "physical block size = 256"),
        ({"size": SIZE, "max_io_bytes": 1000}, "maximum request size = 1000"),
        ({"size": 1 << 64}, "size = 18446744073709551616"),
    ],
)
def test_impossible_shapes_are_value_errors(driver, shape, words):
    with pytest.raises(ValueError, match=words):
        Disk(**shape).start()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"queues": 0}, "queues = 0"),
        ({"queues": 4097}, "queues = 4097"),
        ({"depth": 0}, "queue depth = 0"),
        ({"depth": 4097}, "depth = 4097"),
        ({"depth": -1}, "depth = -1"),
        ({"id": -1}, "id = -1"),
        ({"id": 1 << 20}, "id = 1048576"),
    ],
)
def test_impossible_options_are_value_errors(driver, options, words):
    with pytest.raises(ValueError, match=words):
        Disk(size=SIZE).start(**options)


def test_a_disk_that_cannot_be_read_is_a_type_error(driver):
    class Blank(ublk.BlockDevice):
        pass

    with pytest.raises(TypeError, match=r"Blank has no read\(self, offset, buf\)"):
        Blank(size=SIZE).start()


def test_a_forgotten_super_init_is_a_type_error(driver):
    class Forgetful(Disk):
        def __init__(self):
            pass

    with pytest.raises(TypeError, match=r"super\(\).__init__\(size=...\)"):
        Forgetful().start()


def test_a_size_that_is_no_int_is_a_type_error(driver):
    with pytest.raises(TypeError, match="size must be an int, not float"):
        Disk(size=1e6).start()


def test_sigterm_ends_a_block_and_is_given_back(driver):
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(SystemExit) as caught, Disk(size=SIZE).start() as dev:
        threading.Timer(0.1, signal.raise_signal, [signal.SIGTERM]).start()
        dev.wait(10)
    assert caught.value.code == 128 + signal.SIGTERM
    assert driver.devices() == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_programs_own_sigterm_handler_is_left_alone(driver):
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Disk(size=SIZE).start():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_ctrl_c_interrupts_the_wait(driver):
    with pytest.raises(KeyboardInterrupt), Disk(size=SIZE).start() as dev:
        threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()
        dev.wait(10)
    assert driver.devices() == []


def test_a_device_is_not_made_by_hand():
    with pytest.raises(TypeError, match=r"BlockDevice\.start"):
        ublk.Device()


def test_a_forked_child_leaves_the_device_to_its_parent(driver):
    with Disk(size=SIZE).start() as dev:
        child = os.fork()
        if child == 0:
            try:
                dev.stop()
                del dev
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert driver.read(dev.id, 0, 512) == bytes(512)


def test_ctrl_c_while_a_device_starts_leaves_nothing(driver):
    interrupted = 0
    for attempt in range(20):
        ticker = threading.Timer(attempt / 4000, signal.raise_signal, [signal.SIGINT])
        try:
            ticker.start()
            with Disk(size=SIZE).start(queues=2):
                ticker.join()
        except KeyboardInterrupt:
            interrupted += 1
        assert driver.devices() == []
    assert interrupted == 20


def test_a_forked_child_can_make_a_device_of_its_own(driver):
    with Disk(size=SIZE).start():
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with using(FakeDriver()), Disk(size=SIZE).start() as dev:
                    status = 0 if dev.running else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_forked_child_waits_for_no_thread_of_its_parent(driver):
    held, release = threading.Event(), threading.Event()
    locks = [_lifecycle._lock, _interval._lock, _signals._lock, _threads._lock, _watchdog._wake]

    def hold():
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            release.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert held.wait(10)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.alarm(20)
                with using(FakeDriver()), Disk(size=SIZE).start() as dev:
                    status = 0 if dev.running else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        release.set()
        holder.join()


@pytest.mark.parametrize("recoverable", [True, "queue", "reissue", "fail-io"])
def test_another_object_takes_a_recoverable_device_over(driver, recoverable):
    first = Disk(size=1 << 20).start(recoverable=recoverable)
    assert first.recovery == ("reissue" if recoverable is True else recoverable)
    first.quiesce()
    assert not first.running
    first.stop()
    assert driver.devices() == [first.id]
    with ublk.recover(first.id, Disk(size=1 << 20)) as second:
        assert (second.id, second.recovery) == (first.id, first.recovery)
        driver.read(second.id, 0, 512)


def test_a_device_is_recovered_in_any_style(driver):
    class Tasks(ublk.BlockDevice):
        async def read(self, offset, buf):
            buf[:] = b"t" * len(buf)

    device = Disk(size=1 << 20, read_only=True).start(queues=2, recoverable=True)
    device.quiesce()
    with ublk.recover(device.id, Disk(size=1 << 20), workers=3) as device:
        driver.read(device.id, 0, 512)
        device.quiesce()
    with ublk.recover(device.id, Tasks(size=1 << 20)) as device:
        assert driver.read(device.id, 0, 512) == b"t" * 512


def test_what_does_not_fit_leaves_the_device_waiting(driver):
    device = Disk(size=1 << 20).start(recoverable=True)
    device.quiesce()
    with pytest.raises(ValueError, match="size"):
        ublk.recover(device.id, Disk(size=1 << 19))
    with ublk.recover(device.id, Disk(size=1 << 20)):
        assert driver.devices() == [device.id]


def test_a_device_that_was_not_made_for_it_is_not_left(driver):
    with Disk(size=1 << 20).start() as device:
        with pytest.raises(ublk.UblkError, match="not started with recoverable"):
            device.quiesce()
        with pytest.raises(ublk.UblkError, match="created without recovery"):
            ublk.recover(device.id, Disk(size=1 << 20))
        assert device.running


def test_a_disk_changes_its_size(driver):
    disk = Disk(size=1 << 20)
    with disk.start() as device:
        device.resize(1 << 19)
        assert device.size == disk.size == 1 << 19
        with pytest.raises(ValueError, match="multiple"):
            device.resize(1000)


def test_statistics_count_requests_and_how_often_python_was_entered(driver):
    with Disk(size=1 << 20).start() as device:
        for _ in range(5):
            driver.read(device.id, 0, 4096)
        # They are added before the round's submission, which is what the client waits for.
        stats = device.stats()
        assert stats.operations["read"].requests == stats.requests == 5
        assert stats.operations["read"].bytes == 5 * 4096
        assert stats.operations["read"].errors == 0
        assert 0 < stats.operations["read"].p50 <= stats.operations["read"].max < 60
        assert 1 <= stats.entries <= 5


class SlowAtFirst(ublk.BlockDevice):
    entered = 0

    def handle(self, requests):
        self.entered += 1
        if self.entered == 1:
            time.sleep(0.2)
        for request in requests:
            request.complete()


def test_requests_gather_while_several_are_under_way(driver):
    disk = SlowAtFirst(size=1 << 20)
    with disk.start(coalesce_usecs=10_000) as device:
        readers = [
            threading.Thread(target=lambda: [driver.read(device.id, 0, 4096) for _ in range(20)]) for _ in range(8)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert device.stats().requests == 160
        assert disk.entered <= 80


@pytest.mark.parametrize("usecs", [-1, 10_001])
def test_requests_cannot_gather_for_long(driver, usecs):
    with pytest.raises(ValueError, match="coalesc"):
        Disk(size=1 << 20).start(coalesce_usecs=usecs)


def test_an_unknown_way_of_recovery_is_a_value_error(driver):
    with pytest.raises(ValueError, match="fail-io"):
        Disk(size=1 << 20).start(recoverable="always")


def test_the_switch_interval_is_short_while_devices_run_and_given_back(driver):
    before = sys.getswitchinterval()
    with Disk(size=1 << 20).start():
        with Disk(size=1 << 20).start():
            assert sys.getswitchinterval() == pytest.approx(0.0005)
        assert sys.getswitchinterval() == pytest.approx(0.0005)
    assert sys.getswitchinterval() == pytest.approx(before)


def test_a_switch_interval_of_the_programs_own_is_left_alone(driver):
    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(0.0001)
        with Disk(size=1 << 20).start():
            assert sys.getswitchinterval() == pytest.approx(0.0001)
        assert sys.getswitchinterval() == pytest.approx(0.0001)
        sys.setswitchinterval(before)
        with Disk(size=1 << 20).start():
            sys.setswitchinterval(0.002)
        assert sys.getswitchinterval() == pytest.approx(0.002)
    finally:
        sys.setswitchinterval(before)


def test_a_native_disk_leaves_the_switch_interval_alone(driver):
    before = sys.getswitchinterval()
    with ublk.Mem(1 << 20).start():
        assert sys.getswitchinterval() == before


def test_a_zoned_disk_says_so_in_full(driver):
    class Zoned(Disk):
        def report_zones(self, offset, count):
            return []

        def zone_reset(self, offset): ...

    with Zoned(size=1 << 20, zone_size=1 << 18).start() as device:
        assert device.data_movement == "user-copy"
    with pytest.raises(TypeError, match="no zone_size"):
        Zoned(size=1 << 20).start()
    with pytest.raises(TypeError, match="report_zones"):
        Disk(size=1 << 20, zone_size=1 << 18).start()
    with pytest.raises(ValueError, match="power of two"):
        Zoned(size=1 << 20, zone_size=1 << 18 | 512).start()


def test_zones_are_packed_as_the_kernel_wants_them():
    zone = ublk.Zone(1 << 20, 1 << 20, (1 << 20) + 4096, ublk.ZoneCondition.CLOSED, capacity=1 << 19)
    packed = zone._pack()
    assert len(packed) == 64
    words = [int.from_bytes(packed[at : at + 8], sys.byteorder) for at in (0, 8, 16, 32)]
    assert words == [2048, 2048, 2056, 1024]
    assert packed[24:28] == bytes([2, 4, 0, 0])


def _reported(zones, offset=0, size=4 << 20):
    report = bytearray(64 * 4)
    disk = Disk(size=4 << 20, zone_size=1 << 20)
    fill = reporter(disk, lambda first, count: (zone for zone in zones if zone.start >= first))
    disk.size = size
    fill(offset, memoryview(report))
    return report


def _empty(number, **others):
    start = number << 20
    return ublk.Zone(start, **({"length": 1 << 20, "write_pointer": start, "condition": ZoneCondition.EMPTY} | others))


def test_a_report_ends_with_the_disk():
    zones = [_empty(2), _empty(3)]
    report = _reported(zones, offset=2 << 20)
    assert report[:128] == b"".join(zone._pack() for zone in zones)
    assert report[128:] == bytes(128)


def test_a_report_from_the_middle_of_a_zone_begins_with_that_zone():
    zones = [_empty(number) for number in range(4)]
    assert _reported(zones, offset=(3 << 20) + 512) == zones[3]._pack() + bytes(3 * 64)


def test_a_report_follows_the_disk_s_size():
    zones = [_empty(number) for number in range(2)]
    assert _reported(zones, size=2 << 20) == zones[0]._pack() + zones[1]._pack() + bytes(2 * 64)


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (_empty(2), "a zone at 2097152 instead of the one at 1048576"),
        (_empty(1, length=1 << 19), "has 1048576 bytes, not 524288"),
        (_empty(1, capacity=2 << 20), "invalid capacity: 2097152"),
        (_empty(1, write_pointer=0), "the write pointer 0 is not in the zone at 1048576"),
    ],
)
def test_zones_that_the_kernel_would_refuse_are_named(second, reason):
    with pytest.raises(ValueError, match=reason):
        _reported([_empty(0), second, _empty(2), _empty(3)])


def test_a_report_that_lacks_zones_is_refused():
    with pytest.raises(ValueError, match="returned 1 zones"):
        _reported([_empty(0)])


def test_write_pointers_of_zones_without_one_mean_nothing():
    full = [_empty(number, write_pointer=0, condition=ZoneCondition.FULL) for number in range(4)]
    assert _reported(full) == b"".join(zone._pack() for zone in full)


def test_shared_memory_is_for_devices_that_were_made_for_it(driver, tmp_path):
    with pytest.raises(ValueError, match="isolated"):
        Disk(size=SIZE).start(shared_memory=True, isolated=True)
    with pytest.raises(ValueError, match="cannot be combined with recovery"):
        Disk(size=SIZE).start(shared_memory=True, recoverable=True)
    with open(tmp_path / "memory", "w+b") as file:
        with Disk(size=SIZE).start() as dev, pytest.raises(ublk.UblkError, match="shared_memory=True"):
            dev.share_memory(file)
        with Disk(size=SIZE).start(shared_memory=True) as dev:
            for size in (0, 1000):
                file.truncate(size)
                with pytest.raises(ValueError, match=f"has {size} bytes"):
                    dev.share_memory(file)
            with pytest.raises(OSError, match="Bad file"):
                dev.share_memory(9999)


def test_iterations_may_end_in_any_order(driver):
    def iteration(dev):
        requests = iter(dev.requests())
        threading.Timer(0.1, lambda: pool.submit(driver.read, dev.id, 0, 512)).start()
        with next(requests) as request:
            request.buffer[:] = bytes(512)
        return requests

    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    with concurrent.futures.ThreadPoolExecutor() as pool, contextlib.ExitStack() as stack:
        disks = [ublk.BlockDevice(size=SIZE) for _ in range(4)]
        devices = [stack.enter_context(disk.start(pull=True)) for disk in disks]
        one, two = iteration(devices[0]), iteration(devices[1])
        one.close()
        two.close()
        assert signal.set_wakeup_fd(before) == before
        # One that is collected by another thread, where the descriptor cannot be put back.
        requests = [iteration(devices[2])]
        thread = threading.Thread(target=lambda: requests.pop().close())
        thread.start()
        thread.join()
        iteration(devices[3]).close()
        assert signal.set_wakeup_fd(before) == before


HUNG = """
import errno, threading, time
import ublk
from ublk._driver import using
from ublk._ublk import FakeDriver

class Hangs(ublk.BlockDevice):
    def read(self, offset, buf):
        entered.set()
        leave.wait()

def time_out():
    raise ublk.UblkError(errno.ETIMEDOUT, "a handler does not return")

entered, leave = threading.Event(), threading.Event()
driver = FakeDriver()
with using(driver):
    dev = Hangs(size=1 << 20).start()
client = threading.Thread(target=driver.read, args=(dev.id, 0, 512), daemon=True)
client.start()
assert entered.wait(10)
try:
    # As a stop does after a minute.
    dev._end(time_out)
except ublk.UblkError:
    pass
"""


def test_a_program_ends_at_once_if_a_handler_has_made_a_stop_time_out():
    ended = subprocess.run([sys.executable, "-c", HUNG], capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1, ended.stderr
    assert "a handler is stuck" in ended.stderr


def test_a_handler_that_has_returned_since_is_no_reason_to_leave_the_device():
    late = HUNG + "leave.set()\nclient.join()\n"
    ended = subprocess.run([sys.executable, "-c", late], capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "was still running when the program ended" in ended.stderr


@pytest.mark.parametrize("timeout", [float("inf"), 1e300, 1e10])
def test_a_wait_may_be_as_long_as_any(driver, timeout):
    device = Disk(size=1 << 20).start()
    assert device.wait_ready(timeout)
    threading.Timer(0.2, device.stop).start()
    assert device.wait(timeout)
    with pytest.raises(ValueError, match="nan"):
        device.wait(float("nan"))
    device.stop()


def test_a_loop_that_ends_under_its_devices_leaves_no_descriptor():
    class Tasks(ublk.BlockDevice):
        async def read(self, offset, buf): ...

    async def main():
        with using(FakeDriver()):
            return await Tasks(size=1 << 20).start_async()

    counts = []
    for _ in range(4):
        device = asyncio.run(main())
        with contextlib.suppress(ublk.UblkError):
            device.stop()
        del device
        gc.collect()
        counts.append(len(os.listdir("/proc/self/fd")))
    assert counts[-1] <= counts[0] + 1, counts
