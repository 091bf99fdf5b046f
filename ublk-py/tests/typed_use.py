# SPDX-License-Identifier: MIT OR Apache-2.0

"""What users write, for type checkers: there must be nothing to complain about. It is not run."""

import asyncio
import errno
import os
from collections.abc import Iterable, Sequence

import ublk
from ublk import testing


class Ram(ublk.BlockDevice):
    def __init__(self, size: int) -> None:
        super().__init__(size=size, block_size=4096)
        self.data = bytearray(size)

    def read(self, offset: int, buf: memoryview) -> None:
        buf[:] = self.data[offset : offset + len(buf)]

    def write(self, offset: int, buf: memoryview) -> int:
        self.data[offset : offset + len(buf)] = buf
        return len(buf)

    def flush(self) -> None:
        ublk.FileSync(3).sync()

    def discard(self, offset: int, length: int) -> None:
        raise NotImplementedError


class Tasks(ublk.BlockDevice):
    async def read(self, offset: int, buf: memoryview) -> None:
        await asyncio.sleep(0.01)
        buf[:] = bytes(len(buf))

    async def write(self, offset: int, buf: memoryview) -> ublk.Extent:
        return ublk.Extent(3, offset, len(buf))

    async def flush(self) -> None:
        await asyncio.sleep(0.01)


class Batches(ublk.BlockDevice):
    operations = ("read", "write")

    def handle(self, requests: Sequence[ublk.Request]) -> None:
        for request in requests:
            if request.op is ublk.Op.READ:
                request.buffer[:] = bytes(request.length)
                request.complete()
            else:
                request.fail(errno.EROFS)


class Maps(ublk.BlockDevice):
    def __init__(self, path: str) -> None:
        self.file = open(path, "r+b")  # noqa: SIM115
        super().__init__(size=os.fstat(self.file.fileno()).st_size)

    def map(self, op: ublk.Op, offset: int, length: int) -> ublk.Extent | ublk.Zeros | None:
        if op == "read":
            return ublk.Zeros(length, stable=True)
        return ublk.Extent(self.file, offset, length) if offset else None

    def read(self, offset: int, buf: memoryview) -> ublk.Zeros:
        self.invalidate(offset, len(buf))
        return ublk.Zeros(len(buf))


class Zones(ublk.BlockDevice):
    def read(self, offset: int, buf: memoryview) -> None:
        buf[:] = bytes(len(buf))

    def report_zones(self, offset: int, count: int) -> Iterable[ublk.Zone]:
        yield ublk.Zone(offset, 1 << 20, offset, ublk.ZoneCondition.EMPTY)

    def zone_append(self, offset: int, buf: memoryview) -> int:
        return offset

    def zone_reset(self, offset: int) -> None:
        pass


def main() -> None:
    with Ram(1 << 20).start(queues=2, workers=4, isolated=True) as dev:
        stats: ublk.Stats = dev.stats()
        latency: float = stats.operations["read"].p99
        print(stats.entries, latency, dev.path, dev.info.pid)
    with Tasks(size=1 << 20).start(loop_factory=asyncio.new_event_loop, recoverable="queue") as dev:
        ended: bool = dev.wait(1.0)
        print(ended)
        dev.quiesce()
    with ublk.recover(0, Maps("disk.img"), hang_timeout=None) as dev:
        dev.resize(1 << 20)
    with ublk.BlockDevice(size=1 << 20).start(pull=True) as dev:
        for request in dev.requests():
            with request:
                request.buffer[:] = bytes(request.length)
    with ublk.File("disk.img", read_only=True).start(shared_memory=True) as dev:
        number: int = dev.share_memory(os.memfd_create("shared"))
        dev.unshare_memory(number)
    with testing.open(Ram(1 << 20)) as file:
        file.pwrite(0, b"x" * 4096)
    for info in ublk.devices():
        ublk.SystemDevice(info.id).delete(force=True)
    try:
        ublk.run(Batches(size=1 << 20), workers=None)
    except ublk.UblkError as error:
        print(error.errno)


async def main_async() -> None:
    async with await Tasks(size=1 << 20).start_async() as dev:
        await dev.wait_async()
        async for request in dev.requests():
            request.complete()


class OtherNames(ublk.BlockDevice):
    """Arguments are positional: methods may name them as they like."""

    def read(self, at: int, into: memoryview) -> None:
        into[:] = bytes(len(into))

    def discard(self, first: int, count: int) -> None:
        pass


def bounded(device: ublk.Device) -> None:
    device.stop(timeout=5, cancel=True)
    device.stop(None)
    ublk.SystemDevice(device.id).delete()
