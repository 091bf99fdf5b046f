# SPDX-License-Identifier: MIT OR Apache-2.0

"""Many threads at once: what they do to each other, with an interpreter lock and without."""

import concurrent.futures
import contextlib
import os
import queue
import random
import sys
import threading
import time

import pytest

import ublk
from ublk._driver import using

BLOCK = 4096
# For each client of a disk.
ROOM = 16 * BLOCK
CLIENTS = 6
SIZE = CLIENTS * ROOM
QUEUES = 3
# Nothing takes so long unless something hangs.
SECONDS = 60


def together(*jobs):
    """Call functions at the same time, each on a thread of its own, and raise what one of them raises."""
    start = threading.Barrier(len(jobs), timeout=SECONDS)

    def begin(job):
        start.wait()
        job()

    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        for future in [pool.submit(begin, job) for job in jobs]:
            future.result(SECONDS)


@contextlib.contextmanager
def meanwhile(*jobs):
    """Call functions over and over while the block runs, each on a thread of its own."""
    over = threading.Event()

    def repeat(job):
        while not over.is_set():
            job()

    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(repeat, job) for job in jobs]
        try:
            yield
        finally:
            over.set()
        for future in futures:
            future.result(SECONDS)


class Memory:
    """The bytes of a disk."""

    def __init__(self):
        self.data = bytearray(SIZE)

    def carry_out(self, request):
        here = slice(request.offset, request.offset + request.length)
        if request.op is ublk.Op.READ:
            request.buffer[:] = self.data[here]
        else:
            self.data[here] = request.buffer
        request.complete()


class Methods(ublk.BlockDevice):
    def __init__(self, memory):
        super().__init__(size=SIZE)
        self.data = memory.data

    def read(self, offset, buf):
        buf[:] = self.data[offset : offset + len(buf)]

    def write(self, offset, buf):
        self.data[offset : offset + len(buf)] = buf


class Batches(ublk.BlockDevice):
    def __init__(self, memory):
        super().__init__(size=SIZE)
        self.memory = memory

    def handle(self, requests):
        for request in requests:
            self.memory.carry_out(request)


STYLES = ["methods", "workers", "handle", "pull"]


@contextlib.contextmanager
def served(driver, style):
    """Serve a disk with several queues, by several threads."""
    memory, options = Memory(), {"queues": QUEUES, "depth": 4}
    if style == "pull":
        with using(driver), ublk.BlockDevice(size=SIZE).start(pull=True, **options) as dev:
            takers = [threading.Thread(target=take_all, args=[dev, memory]) for _ in range(QUEUES)]
            for taker in takers:
                taker.start()
            assert dev.wait_ready(SECONDS)
            yield dev
        for taker in takers:
            taker.join(SECONDS)
            assert not taker.is_alive()
        return
    if style == "workers":
        options["workers"] = 2 * QUEUES
    disk = Batches(memory) if style == "handle" else Methods(memory)
    with using(driver), disk.start(**options) as dev:
        yield dev


def take_all(dev, memory):
    for request in dev.requests():
        memory.carry_out(request)


def client(driver, dev, number, rounds):
    """Make a function that writes and reads a part of a disk at random, and compares."""

    def run():
        chance, model, first = random.Random(number), bytearray(ROOM), number * ROOM
        for _ in range(rounds):
            at = chance.randrange(0, ROOM, 512)
            length = chance.randrange(512, ROOM - at + 1, 512)
            model[at : at + length] = chance.randbytes(length)
            driver.write(dev.id, first + at, bytes(model[at : at + length]))
            at = chance.randrange(0, ROOM, 512)
            assert driver.read(dev.id, first + at, ROOM - at) == model[at:]

    return run


def clients(driver, dev, rounds):
    return [client(driver, dev, number, rounds) for number in range(CLIENTS)]


@pytest.mark.parametrize("style", STYLES)
def test_each_client_reads_what_it_wrote(driver, style):
    with served(driver, style) as dev:
        together(*clients(driver, dev, 150))


@pytest.mark.parametrize("style", STYLES)
def test_a_device_may_be_looked_at_while_it_serves(driver, style):
    with served(driver, style) as dev:
        looks = []

        def look():
            stats = dev.stats()
            assert stats.requests >= 0
            assert stats.entries >= 0
            assert repr(dev)
            assert dev.running
            assert all(seconds >= 0 for _thread, _call, seconds in dev._native.busy())
            looks.append(1)

        with meanwhile(look, look):
            together(*clients(driver, dev, 20))
        assert looks
        operations = dev.stats().operations
        # As the driver counts them, a part of the requests may be longer than others are allowed to be.
        assert operations["write"].requests >= CLIENTS * 20
        assert operations["read"].requests >= CLIENTS * 20


@pytest.mark.parametrize("style", STYLES)
def test_devices_start_and_stop_beside_each_other(driver, style):
    def live(number):
        def run():
            for turn in range(8):
                with served(driver, style) as dev:
                    data = bytes([number, turn]) * 1024
                    driver.write(dev.id, number * ROOM, data)
                    assert driver.read(dev.id, number * ROOM, len(data)) == data

        return run

    together(*map(live, range(4)))


@pytest.mark.parametrize("style", STYLES)
def test_a_device_that_many_stop_finishes_or_fails_each_request(driver, style):
    for _ in range(4):
        with served(driver, style) as dev:
            ready = threading.Barrier(5, timeout=SECONDS)

            def use(dev=dev, ready=ready):
                assert driver.read(dev.id, 0, BLOCK) == bytes(BLOCK)
                ready.wait()
                with contextlib.suppress(OSError):
                    while True:
                        assert driver.read(dev.id, 0, BLOCK) == bytes(BLOCK)

            def stop(dev=dev, ready=ready):
                ready.wait()
                dev.stop()

            together(use, use, use, stop, stop)
            assert not dev.running


class Shared:
    """Requests that several threads get their hands on, one request after the other."""

    def __init__(self, driver, *hands):
        """Each of `hands` is called with each request, at the same time as the others."""
        self.driver = driver
        self.hands = hands
        self.barrier = threading.Barrier(len(hands), timeout=SECONDS)
        self.lines = [queue.SimpleQueue() for _ in hands]
        # Each hand's outcome for each request.
        self.outcomes = [[] for _ in hands]

    def work(self, number):
        for request in iter(self.lines[number].get, None):
            self.barrier.wait()
            self.outcomes[number].append(self.hands[number](request))

    def hand_out(self, requests):
        for request in requests:
            for line in self.lines:
                line.put(request)

    def run(self, use):
        """Serve a disk, so that memory is used again at once, while `use` is called with its number."""

        hand_out = self.hand_out

        class Disk(ublk.BlockDevice):
            def handle(self, requests):
                hand_out(requests)

        threads = [threading.Thread(target=self.work, args=[number]) for number in range(len(self.hands))]
        for thread in threads:
            thread.start()
        with Disk(size=SIZE).start(depth=1) as dev:
            use(dev.id)
        for line in self.lines:
            line.put(None)
        for thread in threads:
            thread.join(SECONDS)
            assert not thread.is_alive()


def ended(end):
    """Return whether this was the end of a request."""
    try:
        end()
    except ValueError:
        return False
    return True


def test_a_request_that_many_end_ends_once(driver):
    shared = Shared(driver, lambda r: ended(r.complete), lambda r: ended(r.fail), lambda r: ended(lambda: r.fail(28)))
    failed = []

    def use(id):
        for _ in range(600):
            try:
                driver.write(id, 0, bytes(512))
                failed.append(None)
            except OSError as error:
                failed.append(error.errno)

    shared.run(use)
    assert len(failed) == 600
    for results in zip(failed, *shared.outcomes, strict=True):
        assert results in [(None, True, False, False), (5, False, True, False), (28, False, False, True)]


def test_a_request_may_be_looked_at_while_it_ends(driver):
    def look(request):
        return [repr(request), request.done, repr(request), request.done]

    shared = Shared(driver, lambda request: request.complete(), look, look)

    def use(id):
        for number in range(600):
            driver.write(id, number % 64 * 512, bytes(512))

    shared.run(use)
    for found in shared.outcomes[1] + shared.outcomes[2]:
        first, was_done, second, is_done = found
        assert is_done >= was_done
        assert second in (first, first.removesuffix(">") + " done>")


def content(number):
    """Return the bytes of the write with a number; no two in a row are alike."""
    return bytes([number % 251]) * ROOM


def test_a_buffer_that_is_looked_at_while_its_request_ends_is_that_requests(driver):
    def look(request):
        try:
            return bytes(request.buffer)
        except ValueError:
            return None

    shared = Shared(driver, lambda request: request.complete(), look, look)

    def use(id):
        for number in range(1500):
            driver.write(id, 0, content(number))

    shared.run(use)
    for outcomes in shared.outcomes[1:]:
        for number, found in enumerate(outcomes):
            assert found in (None, content(number))


def test_threads_that_ask_for_a_buffer_at_once_get_the_same_memory(driver):
    done = threading.Barrier(2, timeout=SECONDS)

    def fill(byte, at):
        def run(request):
            request.buffer[at : at + 256] = bytes([byte]) * 256
            if done.wait() == 0:
                request.complete()

        return run

    shared = Shared(driver, fill(1, 0), fill(2, 256))

    def use(id):
        for _ in range(600):
            assert driver.read(id, 0, 512) == b"\x01" * 256 + b"\x02" * 256

    shared.run(use)


def write_whole(view):
    view[:] = b"\xee" * len(view)


def write_slice(view):
    part = view[:]
    time.sleep(0)
    part[:] = b"\xee" * len(part)


def write_another_view(view):
    other = memoryview(view.obj)
    time.sleep(0)
    other[:] = b"\xee" * len(other)


@pytest.mark.parametrize("scribble", [write_whole, write_slice, write_another_view])
@pytest.mark.parametrize("workers", [None, 1])
def test_a_view_that_another_thread_keeps_reaches_no_other_request(driver, scribble, workers):
    kept = queue.SimpleQueue()

    class Disk(ublk.BlockDevice):
        def read(self, offset, buf):
            if offset:
                buf[:] = bytes([offset // BLOCK % 251]) * len(buf)
            else:
                kept.put(buf)
                # They are at it when this returns.
                time.sleep(0.0001)

    def write_until_it_is_over():
        for view in iter(kept.get, None):
            with contextlib.suppress(ValueError, BufferError):
                while True:
                    scribble(view)

    scribblers = [threading.Thread(target=write_until_it_is_over) for _ in range(2)]
    for thread in scribblers:
        thread.start()
    try:
        # Long enough for a copy to be under way when the request ends.
        length = 256 << 10
        with Disk(size=2 * length).start(depth=1, workers=workers) as dev:
            for number in range(400):
                block = number % (length // BLOCK) + 1
                # What this one reads may be anything, and the next one has the same memory unless something holds it.
                driver.read(dev.id, 0, length)
                assert driver.read(dev.id, block * BLOCK, length) == bytes([block % 251]) * length
    finally:
        for _ in scribblers:
            kept.put(None)
        for thread in scribblers:
            thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in scribblers)


def test_extents_may_be_taken_back_by_many_while_others_are_found(driver, tmp_path):
    # The same bytes in two places, so that it does not matter which one a request finds.
    expected = random.Random(3).randbytes(SIZE)
    (tmp_path / "twice").write_bytes(expected * 2)
    with open(tmp_path / "twice", "rb") as file:

        class Disk(ublk.BlockDevice):
            operations = ()

            def map(self, op, offset, length):
                start = offset // BLOCK * BLOCK
                return ublk.Extent(file, random.choice([0, SIZE]) + start, BLOCK, start=start, stable=True)

            def read(self, offset, buf):
                return os.preadv(file.fileno(), [buf], offset)

        disk = Disk(size=SIZE)

        def read(number):
            chance = random.Random(number)

            def run():
                for _ in range(300):
                    at = chance.randrange(0, SIZE - 4 * BLOCK, 512)
                    assert driver.read(dev.id, at, 4 * BLOCK) == expected[at : at + 4 * BLOCK]

            return run

        def invalidate():
            disk.invalidate(0, SIZE // 2)
            disk.invalidate(wait=True)

        with disk.start(queues=QUEUES) as dev, meanwhile(invalidate, invalidate):
            together(*map(read, range(CLIENTS)))


@pytest.mark.skipif(
    getattr(sys, "_is_gil_enabled", lambda: True)(), reason="with its lock the interpreter runs one handler at a time"
)
def test_handlers_of_two_queues_run_at_the_same_time(driver):
    inside, met = set(), []

    class Disk(ublk.BlockDevice):
        def read(self, offset, buf):
            other = BLOCK - offset
            inside.add(offset)
            deadline = time.monotonic() + SECONDS / 2
            while other not in inside and time.monotonic() < deadline:
                pass
            met.append(other in inside)

    with Disk(size=SIZE).start(queues=2) as dev:
        before = sys.getswitchinterval()
        # A lock would not be given up while a handler computes.
        sys.setswitchinterval(1000)
        try:
            together(lambda: driver.read(dev.id, 0, 512), lambda: driver.read(dev.id, BLOCK, 512))
        finally:
            sys.setswitchinterval(before)
    assert met == [True, True]
