# SPDX-License-Identifier: MIT OR Apache-2.0

"""Disks that say where their bytes lie."""

import asyncio
import contextlib
import copy
import errno
import os
import random
import threading

import pytest

import ublk
from ublk import _block_device, testing

SIZE = 1 << 20


@pytest.fixture
def file(tmp_path):
    with open(tmp_path / "backing", "w+b") as file:
        file.truncate(2 * SIZE)
        yield file


class Mapped(ublk.BlockDevice):
    """A disk whose `map` is the given function; reads that it leaves are full of `h`, writes are noted."""

    def __init__(self, function, **shape):
        super().__init__(size=SIZE, **shape)
        self.function = function
        self.asked = []
        self.handled = []

    def map(self, op, offset, length):
        self.asked.append((op, offset, length))
        return self.function(op, offset, length)

    def read(self, offset, buf):
        self.handled.append(("read", offset, len(buf)))
        buf[:] = b"h" * len(buf)

    def write(self, offset, buf):
        self.handled.append(("write", offset, bytes(buf[:4])))


def test_bytes_go_from_and_to_the_file(file):
    disk = Mapped(lambda op, offset, length: ublk.Extent(file, SIZE + offset, length))
    with testing.open(disk) as device:
        device.pwrite(4096, b"a" * 8192)
        assert os.pread(file.fileno(), 8192, SIZE + 4096) == b"a" * 8192
        os.pwrite(file.fileno(), b"b" * 512, SIZE + 512)
        assert device.pread(0, 1024) == bytes(512) + b"b" * 512
        assert device.device.stats().operations["read"].requests == 1
    assert disk.handled == []
    assert disk.asked == [("write", 4096, 8192), ("read", 0, 1024)]


def test_a_request_is_put_together_from_pieces(file):
    def where(op, offset, length):
        at = offset // 1024
        if at % 3 == 2:
            return ublk.Zeros(1024 - offset % 1024)
        return ublk.Extent(file, (at % 3) * SIZE + offset, 1024 - offset % 1024)

    os.pwrite(file.fileno(), bytes([1]) * SIZE, 0)
    os.pwrite(file.fileno(), bytes([2]) * SIZE, SIZE)
    with testing.open(Mapped(where)) as device:
        found = device.pread(512, 8192)
        expected = b"".join(bytes([{0: 1, 1: 2, 2: 0}[n % 3]]) * 1024 for n in range(9))
        assert found == expected[512 : 512 + 8192]


def test_what_is_not_mapped_goes_to_the_handlers(file):
    def where(op, offset, length):
        return ublk.Extent(file, offset, length) if offset < 4096 else None

    disk = Mapped(where)
    with testing.open(disk) as device:
        assert device.pread(0, 1024) == bytes(1024)
        assert device.pread(4096, 512) == b"h" * 512
        device.pwrite(8192, b"w" * 512)
        # As a whole, also if a part of it is mapped.
        disk.function = lambda op, offset, length: ublk.Zeros(512) if offset == 0 else None
        assert device.pread(0, 1024) == b"h" * 1024
    assert disk.handled == [("read", 4096, 512), ("write", 8192, b"wwww"), ("read", 0, 1024)]


def test_python_is_not_asked_again_for_a_stable_extent(file):
    disk = Mapped(lambda op, offset, length: ublk.Extent(file, SIZE, SIZE, start=0, stable=True))
    os.pwrite(file.fileno(), b"s" * SIZE, SIZE)
    with testing.open(disk, queues=2) as device:
        assert device.pread(0, 512) == b"s" * 512
        entries = device.device.stats().entries
        for number in range(64):
            assert device.pread(number * 4096, 4096) == b"s" * 4096
        assert device.device.stats().entries == entries
        assert len(disk.asked) == 1
        # Writes are another matter.
        device.pwrite(0, b"t" * 512)
        assert device.pread(0, 1024) == b"t" * 512 + b"s" * 512
        assert len(disk.asked) == 2
        disk.invalidate(4096, 4096)
        device.pread(0, 4096)
        assert len(disk.asked) == 2
        device.pread(4096, 512)
        assert len(disk.asked) == 3


def test_a_file_that_is_shorter_than_said_fails_the_requests_and_the_log_says_so_once(file, caplog):
    with testing.open(Mapped(lambda op, offset, length: ublk.Extent(file, 2 * SIZE - 512 + offset, length))) as device:
        assert device.pread(0, 512) == bytes(512)
        for _ in range(3):
            with pytest.raises(OSError) as raised:
                device.pread(0, 1024)
            assert raised.value.errno == errno.EIO
    (logged,) = [record for record in caplog.records if "unexpected end of file" in record.message]
    assert f"at offset {2 * SIZE}; request failed" in logged.message


def test_a_program_may_close_its_file(tmp_path):
    (tmp_path / "backing").write_bytes(b"c" * SIZE)
    with open(tmp_path / "backing", "rb") as file:
        extent = ublk.Extent(file, 0, SIZE, start=0, stable=True)
    with testing.open(Mapped(lambda *_: extent)) as device:
        assert device.pread(0, 512) == b"c" * 512


def test_an_invalidation_while_map_is_asked_makes_it_asked_again(file):
    disk = Mapped(None)

    def where(op, offset, length):
        if len(disk.asked) == 1:
            disk.invalidate(offset, 512)
            return ublk.Extent(file, SIZE, length, stable=True)
        return ublk.Extent(file, 0, length)

    disk.function = where
    os.pwrite(file.fileno(), b"old" * 512, SIZE)
    os.pwrite(file.fileno(), b"new" * 512, 0)
    with testing.open(disk) as device:
        assert device.pread(0, 512) == (b"new" * 512)[:512]
        assert len(disk.asked) == 2
        assert len(disk._extents) == 0


def test_a_handler_cannot_wait_for_requests(file):
    disk = Mapped(None)
    caught = []

    def where(op, offset, length):
        try:
            disk.invalidate(wait=True)
        except RuntimeError as error:
            caught.append(str(error))

    disk.function = where
    with testing.open(disk) as device:
        device.pread(0, 512)
    assert "own thread" in caught[0]


class Moving(ublk.BlockDevice):
    """Blocks of the disk lie somewhere in a file, and move."""

    BLOCK, COUNT = 4096, 16

    def __init__(self, file):
        super().__init__(size=self.BLOCK * self.COUNT)
        self.file = file.fileno()
        self.places = list(range(self.COUNT))
        self.moving = set()
        self.lock = threading.Lock()
        self.handled = 0

    def place(self, offset):
        number, inside = divmod(offset, self.BLOCK)
        return self.places[number] * self.BLOCK + inside

    def map(self, op, offset, length):
        with self.lock:
            if offset // self.BLOCK in self.moving:
                return None
            return ublk.Extent(self.file, self.place(offset), self.BLOCK - offset % self.BLOCK, stable=True)

    def read(self, offset, buf):
        with self.lock:
            self.handled += 1
            return os.preadv(self.file, [buf], self.place(offset))

    def write(self, offset, buf):
        with self.lock:
            self.handled += 1
            return os.pwritev(self.file, [buf], self.place(offset))

    def move(self, number, place):
        """Move a block, and give its old place to others."""
        with self.lock:
            self.moving.add(number)
        # The handlers have the block now, but a thread may still be on the way to its place. Not under the lock: who
        # is waited for may have to wait for map.
        self.invalidate(number * self.BLOCK, self.BLOCK, wait=True)
        with self.lock:
            os.pwrite(self.file, os.pread(self.file, self.BLOCK, self.places[number] * self.BLOCK), place * self.BLOCK)
            old, self.places[number] = self.places[number], place
            self.moving.discard(number)
        os.pwrite(self.file, b"\xee" * self.BLOCK, old * self.BLOCK)
        return old


def test_moving_extents_about_under_load_loses_nothing(file):
    disk, stop, failures, rounds = Moving(file), threading.Event(), [], [0] * 4

    def client(number):
        chance, model = random.Random(number), bytearray(disk.BLOCK)
        try:
            while not stop.is_set():
                at = chance.randrange(0, disk.BLOCK, 512)
                model[at : at + 512] = chance.randbytes(8) * 64
                device.pwrite(number * disk.BLOCK + at, model[at : at + 512])
                assert device.pread(number * disk.BLOCK, disk.BLOCK) == model
                rounds[number] += 1
        except BaseException as error:
            failures.append(error)
            stop.set()

    with testing.open(disk, queues=2) as device:
        clients = [threading.Thread(target=client, args=[number]) for number in range(4)]
        for thread in clients:
            thread.start()
        chance, spare, moves = random.Random(99), disk.COUNT, 0
        while not stop.is_set() and (moves < 500 or min(rounds) < 200):
            spare = disk.move(chance.randrange(4), spare)
            moves += 1
        stop.set()
        for thread in clients:
            thread.join(20)
        if failures:
            raise failures[0]
    assert disk.handled > 0


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda file: 7, "must return Extent, Zeros or None"),
        (lambda file: ublk.Extent(file, 0, 512, start=4096), "for byte 0"),
    ],
)
def test_a_wrong_answer_is_eio_and_says_what_was_expected(file, caplog, answer, words):
    with testing.open(Mapped(lambda *_: answer(file))) as device, pytest.raises(OSError) as raised:
        device.pread(0, 512)
    assert raised.value.errno == errno.EIO
    assert words in caplog.text


def test_a_write_to_zeros_is_eio_and_says_so(caplog):
    with testing.open(Mapped(lambda *_: ublk.Zeros(512))) as device, pytest.raises(OSError):
        device.pwrite(0, bytes(512))
    assert "cannot be written to" in caplog.text


def test_an_errno_of_map_is_that_of_the_request():
    def where(op, offset, length):
        raise OSError(errno.ENODATA, "not there")

    with testing.open(Mapped(where)) as device, pytest.raises(OSError) as raised:
        device.pread(0, 512)
    assert raised.value.errno == errno.ENODATA


@pytest.mark.parametrize("arguments", [(0, 0), (-1, 512), (1 << 63, 1), (0, 1 << 63)])
def test_impossible_extents_are_refused(file, arguments):
    with pytest.raises((ValueError, OverflowError)):
        ublk.Extent(file, *arguments)


def test_an_extent_is_in_a_file():
    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, "w"), pytest.raises(OSError, match="regular"):
        ublk.Extent(reader, 0, 512)
    for number in (9999, -1):
        with pytest.raises(OSError, match="Bad file"):
            ublk.Extent(number, 0, 512)
    with pytest.raises(AttributeError):
        ublk.Extent("name", 0, 512)


def test_a_disk_that_only_maps_needs_no_other_method(file):
    class OnlyMap(ublk.BlockDevice):
        def map(self, op, offset, length):
            return ublk.Extent(file, offset, length) if offset < 4096 else None

    with testing.open(OnlyMap(size=SIZE)) as device:
        device.pwrite(0, b"o" * 512)
        assert device.pread(0, 512) == b"o" * 512
        with pytest.raises(OSError) as raised:
            device.pread(4096, 512)
        assert raised.value.errno == errno.EOPNOTSUPP
    OnlyMap.operations = ("read",)
    with testing.open(OnlyMap(size=SIZE)) as device:
        assert not device.writable()


class Shared(ublk.BlockDevice):
    """A disk whose first half is stored in a file and whose second half is handled, by threads that are noted."""

    def __init__(self, file):
        super().__init__(size=SIZE)
        self.file = file
        self.data = bytearray(SIZE)
        self.mapping, self.handling = set(), set()

    def map(self, op, offset, length):
        self.mapping.add(threading.get_ident())
        return ublk.Extent(self.file, 0, SIZE // 2, start=0, stable=True) if offset < SIZE // 2 else None

    def read(self, offset, buf):
        self.handling.add(threading.get_ident())
        buf[:] = self.data[offset : offset + len(buf)]

    def write(self, offset, buf):
        self.handling.add(threading.get_ident())
        self.data[offset : offset + len(buf)] = buf


class SharedTasks(Shared):
    """The same with coroutines."""

    async def read(self, offset, buf):
        await asyncio.sleep(0)
        super().read(offset, buf)

    async def write(self, offset, buf):
        await asyncio.sleep(0)
        super().write(offset, buf)


@pytest.mark.parametrize(("kind", "options"), [(Shared, {"workers": 3}), (SharedTasks, {})], ids=["workers", "tasks"])
def test_what_is_not_mapped_goes_to_workers_and_tasks(file, kind, options):
    disk = kind(file)
    with testing.open(disk, **options) as device:
        for offset in (0, SIZE // 2, SIZE // 2 - 4096):
            device.pwrite(offset, bytes([offset % 251 + 1]) * 8192)
            assert device.pread(offset, 8192) == bytes([offset % 251 + 1]) * 8192
    # A request on both sides is handled as a whole.
    assert os.pread(file.fileno(), 8192, 0) == bytes([1]) * 8192
    assert disk.data[SIZE // 2 - 4096 : SIZE // 2 + 4096] == bytes([(SIZE // 2 - 4096) % 251 + 1]) * 8192
    assert disk.handling
    assert disk.mapping.isdisjoint(disk.handling)


@pytest.mark.parametrize("tasks", [False, True])
def test_what_nobody_handles_is_not_supported(file, tasks):
    class Reads(ublk.BlockDevice):
        def map(self, op, offset, length):
            return None

    async def read(offset, buf):
        buf[:] = bytes(len(buf))

    disk = Reads(size=SIZE)
    if tasks:
        disk.read = read
    with testing.open(disk, **({} if tasks else {"workers": 2})) as device, pytest.raises(OSError) as raised:
        device.pwrite(0, bytes(512))
    assert raised.value.errno == errno.EOPNOTSUPP


def test_map_itself_does_not_wait():
    class Waits(ublk.BlockDevice):
        async def map(self, op, offset, length):
            return None

    with pytest.raises(TypeError, match="map must not be a coroutine function"):
        testing.open(Waits(size=SIZE))


class Answers(ublk.BlockDevice):
    """Its handlers answer with what a function gives."""

    def __init__(self, function):
        super().__init__(size=SIZE)
        self.function = function
        self.calls = 0

    def answer(self, op, offset, buf):
        self.calls += 1
        return self.function(self, op, offset, len(buf))

    def read(self, offset, buf):
        return self.answer("read", offset, buf)

    def write(self, offset, buf):
        return self.answer("write", offset, buf)


class AnsweringTasks(Answers):
    """The same with coroutines."""

    async def read(self, offset, buf):
        await asyncio.sleep(0)
        return self.answer("read", offset, buf)

    async def write(self, offset, buf):
        return self.answer("write", offset, buf)


in_every_style = pytest.mark.parametrize(
    ("kind", "options"),
    [(Answers, {}), (Answers, {"workers": 2}), (AnsweringTasks, {})],
    ids=["plain", "workers", "tasks"],
)


@in_every_style
def test_a_handler_may_return_where_the_bytes_lie(file, kind, options):
    def where(_disk, op, offset, length):
        if op == "read" and offset >= SIZE // 2:
            return ublk.Zeros(length)
        return (
            ublk.Extent(file, SIZE + offset, length) if offset % 8192 == 0 else ublk.Extent(file, SIZE, SIZE, start=0)
        )

    with testing.open(kind(where), **options) as device:
        device.pwrite(8192, b"a" * 8192)
        device.pwrite(4096, b"b" * 4096)
        assert os.pread(file.fileno(), 12288, SIZE + 4096) == b"b" * 4096 + b"a" * 8192
        assert device.pread(4096, 12288) == b"b" * 4096 + b"a" * 8192
        assert device.pread(SIZE - 4096, 4096) == bytes(4096)


class KeepsWrites(Answers):
    """Holds on to what is written, and remembers how it began."""

    def __init__(self, function):
        super().__init__(function)
        self.kept, self.seen = [], []

    def answer(self, op, offset, buf):
        if op == "write":
            self.kept.append(buf[:16])
            self.seen.append(bytes(buf[:4]))
        return super().answer(op, offset, buf)


class KeepingTasks(KeepsWrites, AnsweringTasks):
    """The same with coroutines."""


@pytest.mark.parametrize(
    ("kind", "options"),
    [(KeepsWrites, {}), (KeepsWrites, {"workers": 2}), (KeepingTasks, {})],
    ids=["plain", "workers", "tasks"],
)
@pytest.mark.parametrize("stale", [False, True])
def test_a_write_that_is_returned_an_extent_for_arrives_though_its_buffer_is_kept(file, kind, options, stale):
    def where(disk, op, offset, length):
        if stale and disk.calls == 1:
            disk.invalidate()
        return ublk.Extent(file, offset, length)

    disk = kind(where)
    with testing.open(disk, **options) as device:
        device.pwrite(0, b"abcd" * 1024)
        assert os.pread(file.fileno(), 4096, 0) == b"abcd" * 1024
    assert disk.seen == [b"abcd"] * (2 if stale else 1)
    assert all(bytes(kept) == b"abcd" * 4 for kept in disk.kept)


@in_every_style
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda file: ublk.Extent(file, 0, 512), "an extent of 0 to 512 for a request of 0 to 4096"),
        (lambda file: ublk.Extent(file, 0, SIZE, start=0, stable=True), "only map may do so"),
        (lambda file: [ublk.Zeros(512)], "return an extent"),
    ],
    ids=["short", "stable", "list"],
)
def test_a_wrong_extent_of_a_handler_is_eio_and_says_what_was_expected(file, caplog, kind, options, answer, words):
    with testing.open(kind(lambda *_: answer(file)), **options) as device, pytest.raises(OSError) as raised:
        device.pread(0, 4096)
    assert raised.value.errno == errno.EIO
    assert words in caplog.text


@in_every_style
def test_a_handler_whose_extent_was_invalidated_meanwhile_is_called_again(file, kind, options):
    def where(disk, op, offset, length):
        if disk.calls == 1:
            disk.invalidate(0, 4096)
            return ublk.Extent(file, 0, length)
        return ublk.Extent(file, SIZE, length)

    os.pwrite(file.fileno(), b"o" * 4096, 0)
    os.pwrite(file.fileno(), b"n" * 4096, SIZE)
    disk = kind(where)
    with testing.open(disk, **options) as device:
        assert device.pread(0, 4096) == b"n" * 4096
    assert disk.calls == 2


@in_every_style
def test_a_handler_whose_extents_are_always_invalidated_is_given_up(file, caplog, kind, options):
    def where(disk, op, offset, length):
        disk.invalidate()
        return ublk.Extent(file, offset, length)

    with testing.open(kind(where), **options) as device, pytest.raises(OSError) as raised:
        device.pread(0, 512)
    assert raised.value.errno == errno.EIO
    assert "16 times in a row" in caplog.text


def test_a_file_that_cannot_do_it_is_refused(tmp_path, caplog):
    path = tmp_path / "backing"
    path.write_bytes(bytes(SIZE))
    with open(path, "ab") as file, pytest.raises(OSError, match="O_APPEND"):
        ublk.Extent(file, 0, 512)
    with open(path, "rb") as file:
        extent = ublk.Extent(file, 0, SIZE, start=0)
    with testing.open(Mapped(lambda *_: extent)) as device:
        assert device.pread(0, 512) == bytes(512)
        with pytest.raises(OSError):
            device.pwrite(0, bytes(512))
    assert "not open for writing" in caplog.text


def test_a_forked_child_has_none_of_its_parent_s_extents(file):
    class Whole(ublk.BlockDevice):
        def map(self, op, offset, length):
            return ublk.Extent(file, 0, SIZE, start=0, stable=True)

    disk = Whole(size=SIZE)
    with testing.open(disk) as opened:
        opened.pread(0, 512)
        assert len(disk._extents) == 1
        assert disk._extents is disk._extents
        child = os.fork()
        if child == 0:
            os._exit(len(disk._extents) or not disk._extents.invalidate(0, SIZE, 5.0))
        assert os.waitpid(child, 0)[1] == 0
        assert len(disk._extents) == 1


def test_a_coroutine_on_the_caller_s_loop_may_wait_for_requests_on_an_extent(file, driver):
    # They are the engine's, on threads of its own: the loop that waits is not needed for them.
    class Half(ublk.BlockDevice):
        def map(self, op, offset, length):
            return ublk.Extent(file, 0, SIZE // 2, start=0, stable=True) if offset < SIZE // 2 else None

        async def read(self, offset, buf):
            self.invalidate(0, SIZE // 2, wait=True)
            buf[:] = bytes(len(buf))

    async def main():
        disk = Half(size=SIZE)
        async with await disk.start_async() as device:
            reads = [asyncio.to_thread(driver.read, device.id, at * 4096, 4096) for at in range(0, SIZE // 4096, 8)]
            await asyncio.wait_for(asyncio.gather(*reads), 30)

    asyncio.run(main())


def test_a_copy_where_the_first_object_was_has_none_of_its_extents(file, monkeypatch):
    disk = Mapped(lambda op, offset, length: ublk.Extent(file, 0, SIZE, start=0, stable=True))
    # The number of an object that is gone is another's: here, of all.
    monkeypatch.setattr(_block_device, "id", lambda one: 1, raising=False)
    with testing.open(disk) as device:
        device.pread(0, 512)
    assert len(disk._extents) == 1
    assert len(copy.copy(copy.copy(disk))._extents) == 0


def test_a_copy_of_a_disk_has_extents_of_its_own(tmp_path):
    def content(byte):
        path = tmp_path / byte.decode()
        path.write_bytes(byte * SIZE)
        return open(path, "rb")

    class Disk(ublk.BlockDevice):
        operations = ()

        def __init__(self, file):
            super().__init__(size=SIZE)
            self.file = file

        def map(self, op, offset, length):
            return ublk.Extent(self.file, 0, SIZE, start=0, stable=True)

    one = Disk(content(b"1"))
    with testing.open(one) as first:
        assert first.pread(0, 4) == b"1111"
        two = copy.copy(one)
        two.file = content(b"2")
        with testing.open(two) as second:
            assert second.pread(0, 4) == b"2222"
        two.invalidate()
        assert len(one._extents) == 1
    one.file.close()
    two.file.close()


def test_threads_that_come_at_once_get_the_same_extents_of_a_copy(monkeypatch):
    both = threading.Barrier(2)

    def make():
        # Both threads are here at once, unless one of them waits for the other.
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)
        return ublk._ublk.Extents()

    disk = ublk.BlockDevice(size=SIZE)
    assert len(disk._extents) == 0
    made = copy.copy(disk)
    monkeypatch.setattr(_block_device, "Extents", make)
    found = []
    threads = [threading.Thread(target=lambda: found.append(made._extents)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found[0] is found[1] is made._extents
