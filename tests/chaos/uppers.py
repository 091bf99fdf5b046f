# SPDX-License-Identifier: MIT OR Apache-2.0
"""Serves a Python disk that keeps its bytes in a file or on a block device, right or with a planted fault.

Arguments: the class, the path, and a JSON object with the keyword arguments of `start`, or with `recover`, the number
of a device. Prints the path; the end of standard input ends the disk.
"""

import json
import logging
import os
import sys
import threading
import time

import ublk


class Straight(ublk.BlockDevice):
    """Writes to the page cache of what is below; `flush` is fdatasync."""

    def __init__(self, path: str) -> None:
        self.file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        super().__init__(size=os.lseek(self.file, 0, os.SEEK_END))

    def read(self, offset, buf):
        return os.preadv(self.file, [buf], offset)

    def write(self, offset, buf):
        return os.pwritev(self.file, [buf], offset)

    def flush(self):
        os.fdatasync(self.file)


class Mapped(Straight):
    """Says where the bytes are and leaves the rest to the engine."""

    operations = ("read", "write")

    def map(self, op, offset, length):
        return ublk.Extent(self.file, 0, self.size, start=0, stable=True)


class Returned(Straight):
    """Has handlers that return where the bytes are."""

    def read(self, offset, buf):
        return ublk.Extent(self.file, offset, len(buf))

    def write(self, offset, buf):
        return ublk.Extent(self.file, offset, len(buf))


class Coroutines(Straight):
    """The same as `Straight` with coroutines."""

    async def read(self, offset, buf):
        return Straight.read(self, offset, buf)

    async def write(self, offset, buf):
        return Straight.write(self, offset, buf)

    async def flush(self):
        Straight.flush(self)


class FlushesNothing(Straight):
    """Planted fault: flushes are acknowledged and do nothing."""

    def flush(self):
        pass


class FlushesWhatItsQueueWrote(Straight):
    """Planted fault: a flush reaches what is below only if the same queue has written something."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.wrote: set[int] = set()

    def write(self, offset, buf):
        self.wrote.add(threading.get_ident())
        return super().write(offset, buf)

    def flush(self):
        if threading.get_ident() in self.wrote:
            self.wrote.discard(threading.get_ident())
            super().flush()


class ForgetsAtRecovery(Straight):
    """Planted fault: a new server believes that all is clean until it has written something itself."""

    dirty = False

    def write(self, offset, buf):
        self.dirty = True
        return super().write(offset, buf)

    def flush(self):
        if self.dirty:
            super().flush()


class WritesLate(Straight):
    """Planted fault: every fourth write is acknowledged at once and carried out a moment later."""

    count = 0

    def write(self, offset, buf):
        self.count += 1
        if self.count % 4:
            return super().write(offset, buf)
        data = bytes(buf)
        threading.Thread(target=lambda: (time.sleep(0.02), os.pwrite(self.file, data, offset))).start()
        return None


def main() -> None:
    logging.basicConfig(format="%(levelname)s:%(name)s:%(message)s", level=logging.WARNING)
    name, path, start = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    disk = globals()[name](path)
    recover = start.pop("recover", None)
    device = disk.start(**start) if recover is None else ublk.recover(recover, disk)
    print(json.dumps(device.path), flush=True)
    with device:
        sys.stdin.read()


if __name__ == "__main__":
    main()
