# SPDX-License-Identifier: MIT OR Apache-2.0
"""Serves a disk whose handler goes wrong in one way of the catalogue (`catalogue`) at one block.

Arguments: the case, the style of the handlers, and `kernel` or `stand-in`. Prints the path; a line on standard input
arms the fault, and is answered. Other blocks are answered right, before and after.

With the stand-in driver this process is the client, too: each further line, an object with `operation` and `offset`, is
answered by the errno, 0 for success, and the bytes that were read, in hexadecimal digits.
"""

import contextlib
import errno
import inspect
import json
import logging
import os
import sys
import threading

import catalogue
from catalogue import HANDLE, PULL, TASKS
from tools import content

import ublk

SIZE = 4 << 20
# Where handlers go wrong, and how long the block is.
WRONG, LENGTH = 2 << 20, 4096
RUN = 1


def bytes_of(offset: int, length: int) -> bytes:
    """What the disk holds."""
    return content.sectors(RUN, offset // 512, length // 512, 1)


class Base(ublk.BlockDevice):
    """A disk with the same content for ever, which counts writes right that bring what is there."""

    def __init__(self, case: catalogue.Case) -> None:
        super().__init__(size=SIZE)
        self.act = case.act
        # The case is about the request, not about its buffer.
        self.whole = case.styles == catalogue.OBJECTS
        self.kept: list = []
        self.device: ublk.Device | None = None

    def right(self, op, offset, buf):
        if op == "read":
            buf[:] = bytes_of(offset, len(buf))
        elif op == "write" and bytes(buf) != bytes_of(offset, len(buf)):
            raise OSError(5, "foreign bytes")

    def do(self, op, offset, buf):
        if offset == WRONG and self.device is not None:
            return self.act(self, op, offset, buf)
        self.right(op, offset, buf)
        return None


class Plain(Base):
    """Methods."""

    def read(self, offset, buf):
        return self.do("read", offset, buf)

    def write(self, offset, buf):
        return self.do("write", offset, buf)

    def flush(self):
        pass


class Tasks(Base):
    """Coroutines."""

    async def answer(self, op, offset, buf):
        result = self.do(op, offset, buf)
        return await result if inspect.isawaitable(result) else result

    async def read(self, offset, buf):
        return await self.answer("read", offset, buf)

    async def write(self, offset, buf):
        return await self.answer("write", offset, buf)


class Objects(Base):
    """Requests as objects."""

    operations = ("read", "write")

    def serve(self, request):
        op, offset = str(request.op), request.offset
        if offset != WRONG or self.device is None:
            with request:
                self.right(op, offset, request.buffer)
        elif self.whole:
            self.act(self, op, offset, request)
        else:
            with request:
                self.act(self, op, offset, request.buffer)


class Handle(Objects):
    """All requests of a wake-up."""

    def handle(self, requests):
        for request in requests:
            self.serve(request)


def pull(disk: Objects, device: ublk.Device) -> None:
    """Threads that take requests; one that ends by an exception is followed by another."""

    def body() -> None:
        for request in device.requests():
            disk.serve(request)

    def keep_on() -> None:
        while True:
            try:
                body()
                return
            except Exception:
                logging.getLogger("misbehaving").exception("a thread that pulls goes wrong")

    for _ in range(2):
        threading.Thread(target=keep_on, daemon=True).start()
    device.wait_ready()


def be_client(driver, device: ublk.Device, lines, answers) -> None:
    """Sends the requests that are asked for to the stand-in driver."""
    for line in lines:
        asked = json.loads(line)
        data, number = b"", 0
        try:
            if asked["operation"] == "read":
                data = driver.read(device.id, asked["offset"], LENGTH)
            else:
                driver.write(device.id, asked["offset"], bytes_of(asked["offset"], LENGTH))
        except OSError as error:
            number = error.errno or errno.EIO
        answers.write(json.dumps([number, data.hex()]) + "\n")
        answers.flush()


def main() -> None:
    logging.basicConfig(format="%(levelname)s:%(name)s:%(message)s", level=logging.WARNING)
    name, style, start = sys.argv[1], sys.argv[2], {}
    # Handlers may close the standard ones.
    answers, lines = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0))
    driver = ublk._ublk.FakeDriver() if sys.argv[3] == "stand-in" else None
    case = catalogue.PLANTED.get(name) or catalogue.CASES[name]
    disk = {TASKS: Tasks, HANDLE: Handle, PULL: Objects}.get(style, Plain)(case)
    if style == catalogue.WORKERS:
        start["workers"] = 2
    if style == PULL:
        start["pull"] = True
    with contextlib.nullcontext() if driver is None else ublk._driver.using(driver):
        device = disk.start(**start)
    if style == PULL:
        pull(disk, device)
    answers.write(json.dumps(device.path) + "\n")
    answers.flush()
    lines.readline()
    disk.device = device
    answers.write(json.dumps("armed") + "\n")
    answers.flush()
    if driver is not None:
        threading.Thread(target=be_client, args=[driver, device, lines, answers], daemon=True).start()
    try:
        # Until SIGTERM, `ublk del`, or an exception that ends the device.
        device.wait()
    finally:
        device.stop()


if __name__ == "__main__":
    main()
