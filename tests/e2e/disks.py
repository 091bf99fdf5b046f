# SPDX-License-Identifier: MIT OR Apache-2.0
"""Block devices in Python for the tests: well-behaved ones, and ones with every bad habit."""

import asyncio
import concurrent.futures
import errno  # noqa: F401 (for the expressions that Failing evaluates)
import hashlib
import mmap
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ublk

SECTOR = 512


def pattern(offset: int, length: int) -> bytes:
    """Bytes that say where on the disk they belong: each sector is a digest of its number."""
    first = offset // SECTOR
    last = (offset + length + SECTOR - 1) // SECTOR
    sectors = b"".join(hashlib.blake2b(index.to_bytes(8, "little")).digest() * 8 for index in range(first, last))
    return sectors[offset - first * SECTOR :][:length]


def wait_for(condition: Callable[[], Any], seconds: float = 10.0) -> bool:
    """Whether a condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)
    return True


def caught(action: Callable[[], Any]) -> str:
    """The name of the exception that an action raises, or an empty string."""
    try:
        action()
    except BaseException as error:
        return type(error).__name__
    return ""


class ReadOnly(ublk.BlockDevice):
    """Reads give the pattern; nothing else is there."""

    def __init__(self, size: int = 1 << 20, **shape: Any) -> None:
        super().__init__(size=size, **shape)

    def read(self, offset, buf):
        buf[:] = pattern(offset, len(buf))


class Ram(ublk.BlockDevice):
    """A RAM disk that does everything and remembers what it was asked for."""

    def __init__(self, size: int = 8 << 20, **shape: Any) -> None:
        super().__init__(size=size, **shape)
        self.data = bytearray(size)
        self.log: list[tuple[str, int, int]] = []
        self.threads: set[int] = set()
        self.requests_of: dict[int, int] = {}

    def note(self, name: str, offset: int = 0, length: int = 0) -> None:
        thread = threading.get_native_id()
        self.threads.add(thread)
        self.requests_of[thread] = self.requests_of.get(thread, 0) + 1
        self.log.append((name, offset, length))

    def forget(self) -> None:
        self.log.clear()
        self.threads.clear()
        self.requests_of.clear()

    def logged(self, *names: str) -> list[tuple[str, int, int]]:
        return [entry for entry in self.log if not names or entry[0] in names]

    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def read(self, offset, buf):
        self.note("read", offset, len(buf))
        buf[:] = self.data[offset : offset + len(buf)]

    def write(self, offset, buf):
        self.note("write", offset, len(buf))
        self.data[offset : offset + len(buf)] = buf

    def flush(self):
        self.note("flush")

    def discard(self, offset, length):
        self.note("discard", offset, length)
        self.data[offset : offset + length] = bytes(length)

    def write_zeroes(self, offset, length):
        self.note("write_zeroes", offset, length)
        self.data[offset : offset + length] = bytes(length)


class TaskRam(Ram):
    """The same with coroutines."""

    async def read(self, offset, buf):
        await asyncio.sleep(0)
        Ram.read(self, offset, buf)

    async def write(self, offset, buf):
        Ram.write(self, offset, buf)
        await asyncio.sleep(0)


class HandlingRam(ublk.BlockDevice):
    """A RAM disk that gets requests as objects."""

    operations = tuple(ublk.Op)

    def __init__(self, size: int = 8 << 20, **shape: Any) -> None:
        super().__init__(size=size, **shape)
        self.data = bytearray(size)
        self.most = 0

    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def answer(self, request):
        with request:
            place = slice(request.offset, request.offset + request.length)
            if request.op is ublk.Op.READ:
                request.buffer[:] = self.data[place]
            elif request.op is ublk.Op.WRITE:
                self.data[place] = request.buffer
            elif request.op in (ublk.Op.DISCARD, ublk.Op.WRITE_ZEROES):
                self.data[place] = bytes(request.length)


class BatchRam(HandlingRam):
    """All requests of a wake-up at once, answered from the last to the first, half of them by another thread."""

    def __init__(self, *args: Any, **shape: Any) -> None:
        super().__init__(*args, **shape)
        self.pool = concurrent.futures.ThreadPoolExecutor(1)

    def handle(self, requests):
        self.most = max(self.most, len(requests))
        while requests:
            request = requests.pop()
            if request.offset & 4096:
                self.pool.submit(self.answer, request)
            else:
                self.answer(request)


class PullRam(HandlingRam):
    """Two threads take requests."""

    def start(self, **options: Any) -> ublk.Device:
        device = super().start(pull=True, **options)
        for _ in range(2):
            threading.Thread(target=self.serve, args=[device.requests()], daemon=True).start()
        device.wait_ready()
        return device

    def serve(self, requests):
        for request in requests:
            self.answer(request)


class Meeting(ublk.BlockDevice):
    """Reads that wait for each other once they are switched on: so many of them at once."""

    def __init__(self, size: int = 1 << 20, **shape: Any) -> None:
        super().__init__(size=size, **shape)
        self.parties = 0
        self.arrived = 0
        self.everybody = threading.Condition()

    def expect(self, parties: int) -> None:
        self.parties = parties

    def read(self, offset, buf):
        if self.parties:
            with self.everybody:
                self.arrived += 1
                self.everybody.notify_all()
                if not self.everybody.wait_for(lambda: self.arrived >= self.parties, 40):
                    raise TimeoutError


class TaskMeeting(Meeting):
    async def read(self, offset, buf):
        self.arrived += 1 if self.parties else 0
        for _ in range(4000):
            if self.arrived >= self.parties:
                return
            await asyncio.sleep(0.01)
        raise TimeoutError


class OnFile(ublk.BlockDevice):
    """A disk in a file."""

    def __init__(self, path: str, **shape: Any) -> None:
        self.path = path
        self.file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        super().__init__(size=os.fstat(self.file).st_size, **shape)

    def __reduce__(self):
        return type(self), (self.path,)

    def read(self, offset, buf):
        return os.preadv(self.file, [buf], offset)

    def write(self, offset, buf):
        return os.pwritev(self.file, [buf], offset)

    def flush(self):
        os.fdatasync(self.file)


class Whole(OnFile):
    """The same, of which Python says where it is, and no more."""

    def __init__(self, path: str, **shape: Any) -> None:
        super().__init__(path, **shape)
        self.asked = self.handled = 0

    def map(self, op, offset, length):
        self.asked += 1
        return ublk.Extent(self.file, 0, self.size, start=0, stable=True)

    def read(self, offset, buf):
        self.handled += 1
        return super().read(offset, buf)

    def write(self, offset, buf):
        self.handled += 1
        return super().write(offset, buf)


class Halves(OnFile):
    """Its first half is where it says, the second is handled."""

    def map(self, op, offset, length):
        half = self.size // 2
        return ublk.Extent(self.file, 0, half, start=0, stable=True) if offset < half else None


class TaskHalves(Halves):
    """The same with coroutines."""

    async def read(self, offset, buf):
        await asyncio.sleep(0)
        return super().read(offset, buf)

    async def write(self, offset, buf):
        await asyncio.sleep(0)
        return super().write(offset, buf)


class Returns(OnFile):
    """Its handlers return where bytes lie, for every other block of 64 KiB."""

    def read(self, offset, buf):
        even = offset // 65536 % 2 == 0
        return ublk.Extent(self.file, offset, len(buf)) if even else super().read(offset, buf)

    def write(self, offset, buf):
        even = offset // 65536 % 2 == 0
        return ublk.Extent(self.file, offset, len(buf)) if even else super().write(offset, buf)


class TaskReturns(Returns):
    """The same with coroutines."""

    async def read(self, offset, buf):
        return super().read(offset, buf)

    async def write(self, offset, buf):
        return super().write(offset, buf)


class Striped(ublk.BlockDevice):
    """A disk in several files, 8 KiB in each in turn."""

    STRIPE = 8192

    def __init__(self, paths: list[str], **shape: Any) -> None:
        self.files = [os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in paths]
        super().__init__(size=sum(os.fstat(file).st_size for file in self.files), **shape)

    def map(self, op, offset, length):
        stripe, inside = divmod(offset, self.STRIPE)
        turn, which = divmod(stripe, len(self.files))
        return ublk.Extent(self.files[which], turn * self.STRIPE + inside, self.STRIPE - inside, stable=True)


class ReadWrite(ublk.BlockDevice):
    """Reads and writes, nothing else."""

    def __init__(self, size: int = 1 << 20, **shape: Any) -> None:
        super().__init__(size=size, **shape)
        self.data = bytearray(size)

    def read(self, offset, buf):
        buf[:] = self.data[offset : offset + len(buf)]

    def write(self, offset, buf):
        self.data[offset : offset + len(buf)] = buf


class WithFlush(ReadWrite):
    def flush(self):
        pass


class WithDiscard(ReadWrite):
    def discard(self, offset, length):
        self.data[offset : offset + length] = bytes(length)


class WithWriteZeroes(ReadWrite):
    def write_zeroes(self, offset, length):
        self.data[offset : offset + length] = bytes(length)


class InheritedWrite(WithFlush):
    """Overrides by inheritance count as much as those of the class itself."""


class Exact(ReadWrite):
    """Returns the number of bytes, which is allowed if it is all of them."""

    def read(self, offset, buf):
        super().read(offset, buf)
        return len(buf)

    def write(self, offset, buf):
        super().write(offset, buf)
        return len(buf)


class NotReadable(ublk.BlockDevice):
    """Forgot the one method that every disk needs."""

    def __init__(self, size: int = 1 << 20) -> None:
        super().__init__(size=size)

    def write(self, offset, buf):
        pass


class Failing(ReadWrite):
    """Fails as ordered, in one operation at a time."""

    def __init__(self, size: int = 1 << 20, **shape: Any) -> None:
        super().__init__(size, **shape)
        self.failing = ""
        self.how: BaseException | None = None

    def fail(self, operation: str, how: str) -> None:
        self.how = eval(how)
        self.failing = operation

    def maybe(self, operation: str) -> None:
        if operation == self.failing:
            raise self.how

    def read(self, offset, buf):
        self.maybe("read")
        super().read(offset, buf)

    def write(self, offset, buf):
        self.maybe("write")
        super().write(offset, buf)

    def flush(self):
        self.maybe("flush")

    def discard(self, offset, length):
        self.maybe("discard")

    def write_zeroes(self, offset, length):
        self.maybe("write_zeroes")


class Answering(ReadWrite):
    """Returns a given value from `read` and `write`."""

    def __init__(self, size: int = 1 << 20, **shape: Any) -> None:
        super().__init__(size, **shape)
        self.value: Any = None

    def answer(self, value: str) -> None:
        self.value = eval(value)

    def read(self, offset, buf):
        super().read(offset, buf)
        return self.value(buf) if callable(self.value) else self.value

    def write(self, offset, buf):
        super().write(offset, buf)
        return self.value(buf) if callable(self.value) else self.value


class Blocking(ReadWrite):
    """Reads of the sector `gate` wait until the gate is opened, those of `slow` take two seconds."""

    SECONDS = 2.0

    def __init__(self, size: int = 1 << 20, gate: int = 1000, slow: int = 1200, **shape: Any) -> None:
        super().__init__(size, **shape)
        self.gate_sector = gate
        self.slow_sector = slow
        self.gate = threading.Event()
        self.waiting = threading.Event()

    def read(self, offset, buf):
        super().read(offset, buf)
        if offset // SECTOR == self.gate_sector:
            self.waiting.set()
            if not self.gate.wait(30):
                raise TimeoutError("the gate was not opened")
        elif offset // SECTOR == self.slow_sector:
            time.sleep(self.SECONDS)


class StuckWrites(Blocking):
    """Never answers a write."""

    def __init__(self, size: int = 1 << 20, **shape: Any) -> None:
        super().__init__(size, **shape)
        self.wrote = threading.Event()

    def write(self, offset, buf):
        self.wrote.set()
        time.sleep(1e6)


class ReadsItself(ReadWrite):
    """Has a thread that reads its own disk; the handler never answers that, or does the same."""

    def __init__(self, size: int = 1 << 20, **shape: Any) -> None:
        super().__init__(size, **shape)
        self.waiting = threading.Event()
        self.path = ""

    def read_oneself(self, path: str, nested: bool) -> None:
        self.path, self.nested = path, nested
        threading.Thread(target=self.read_sector, args=[1000], daemon=True).start()

    def read_sector(self, sector: int) -> None:
        file = os.open(self.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        os.preadv(file, [mmap.mmap(-1, 4096)], sector * SECTOR)

    def read(self, offset, buf):
        super().read(offset, buf)
        if self.path and offset == 1000 * SECTOR:
            self.waiting.set()
            if self.nested:
                self.read_sector(1200)
            else:
                time.sleep(1e6)


class Gated(ReadWrite):
    """Once armed, it fills what is read at sector 0, and waits for a gate before it returns."""

    def __init__(self, size: int = 1 << 20, **shape: Any) -> None:
        super().__init__(size, **shape)
        self.filled, self.gate = threading.Event(), threading.Event()
        self.armed = False

    def read(self, offset, buf):
        super().read(offset, buf)
        if self.armed and offset == 0:
            buf[:] = b"\x5a" * len(buf)
            self.filled.set()
            self.gate.wait(20)


class KeepsViews(ReadWrite):
    """Keeps the buffers of its requests, as they are."""

    def __init__(self, size: int = 1 << 20, **shape: Any) -> None:
        super().__init__(size, **shape)
        self.views: list[memoryview] = []

    def read(self, offset, buf):
        super().read(offset, buf)
        self.views.append(buf)

    def write(self, offset, buf):
        super().write(offset, buf)
        self.views.append(buf)

    def touch(self) -> list[str]:
        """What happens when the kept views are used: the exception's name, or `alive`."""
        results = []
        for view in self.views:
            try:
                view[0]
                results.append("alive")
            except Exception as error:
                results.append(type(error).__name__)
        return results


class KeepsExports(ReadWrite):
    """Keeps what it made of its buffers: numpy arrays, slices, casts. Remembers what was in them."""

    def __init__(self, size: int = 1 << 20, how: str = "numpy", **shape: Any) -> None:
        super().__init__(size, **shape)
        if how == "numpy":
            import numpy

            self.make = lambda buf: numpy.frombuffer(buf, dtype=numpy.uint8)
        elif how == "slice":
            self.make = lambda buf: buf[: len(buf) // 2]
        elif how == "cast":
            self.make = lambda buf: buf.cast("Q")
        else:
            raise ValueError(how)
        self.keeping = True
        self.kept: list[tuple[Any, bytes]] = []

    def keep(self, buf: memoryview) -> None:
        if self.keeping:
            export = self.make(buf)
            self.kept.append((export, bytes(export)))

    def read(self, offset, buf):
        super().read(offset, buf)
        self.keep(buf)

    def write(self, offset, buf):
        super().write(offset, buf)
        self.keep(buf)

    def changed(self) -> int:
        """How many of the kept exports no longer hold what they held."""
        return sum(bytes(export) != content for export, content in self.kept)

    def writable(self) -> list[bool]:
        return [not memoryview(export).readonly for export, _ in self.kept]

    def scribble(self) -> int:
        """Overwrites every kept export that may be written."""
        count = 0
        for index, (export, _content) in enumerate(self.kept):
            view = memoryview(export)
            if not view.readonly:
                view.cast("B")[:] = b"\xee" * view.nbytes
                self.kept[index] = (export, b"\xee" * view.nbytes)
                count += 1
        return count

    def let_go(self) -> None:
        self.kept.clear()


class Meddling(ReadWrite):
    """Does to its buffers what they do not allow."""

    def __init__(self, size: int = 1 << 20, how: str = "", **shape: Any) -> None:
        super().__init__(size, **shape)
        self.how = how
        self.seen = ""

    def read(self, offset, buf):
        if self.how == "wrong length":
            buf[:] = bytes(len(buf) - 1)
        if self.how == "released":
            buf[:] = self.data[offset : offset + len(buf)]
            buf.release()
            return
        super().read(offset, buf)

    def write(self, offset, buf):
        if self.how == "writes to what it was given to read":
            buf[0] = 1
        super().write(offset, buf)


class Describes(ReadWrite):
    """Remembers what kind of arguments it was called with."""

    def __init__(self, size: int = 1 << 20, **shape: Any) -> None:
        super().__init__(size, **shape)
        self.seen: dict[str, Any] = {}

    @staticmethod
    def describe(buf: memoryview) -> dict[str, Any]:
        return {
            "type": type(buf).__name__,
            "readonly": buf.readonly,
            "format": buf.format,
            "itemsize": buf.itemsize,
            "ndim": buf.ndim,
            "contiguous": buf.c_contiguous,
            "length": len(buf),
        }

    def read(self, offset, buf):
        super().read(offset, buf)
        self.seen["read"] = self.describe(buf) | {"offset": type(offset).__name__}

    def write(self, offset, buf):
        super().write(offset, buf)
        self.seen["write"] = self.describe(buf) | {"offset": type(offset).__name__}


class Prints(ReadWrite):
    """Prints from its handlers, as people do when they look for a fault."""

    def read(self, offset, buf):
        print("reading", offset)
        super().read(offset, buf)


class ForRun(ReadWrite):
    """For `ublk run`: takes its size as an integer and arguments as strings."""

    def __init__(self, size: int = 1 << 20, label: str = "", fail: str = "") -> None:
        super().__init__(size)
        if fail:
            raise RuntimeError(f"this disk fails: {fail}")
        self.data[: len(label)] = label.encode()


class FailsAt(ReadWrite):
    """Raises a given exception when its sector 1000 is read."""

    def __init__(self, how: str) -> None:
        super().__init__(1 << 20)
        self.how = how

    def read(self, offset, buf):
        if offset == 1000 * SECTOR:
            raise eval(self.how)
        super().read(offset, buf)


class Dies(ReadWrite):
    """Leaves the process without any clean-up when its sector 1000 is read."""

    def read(self, offset, buf):
        if offset == 1000 * SECTOR:
            os._exit(3)
        super().read(offset, buf)


def compute() -> None:
    """Keeps the interpreter busy."""
    number = 0
    while True:
        number = (number * 1103515245 + 12345) & 0x7FFFFFFF


def compute_beside() -> None:
    """Has another thread do so."""
    threading.Thread(target=compute, daemon=True).start()


class BusyBeside(ReadWrite):
    """Has a companion thread that computes all the time."""

    def __init__(self, size: int = 1 << 20, **shape: Any) -> None:
        super().__init__(size, **shape)
        compute_beside()
