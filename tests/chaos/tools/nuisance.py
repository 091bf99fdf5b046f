# SPDX-License-Identifier: MIT OR Apache-2.0
"""Clients with bad habits: they leave with I/O in flight, fork, re-read partitions and open disks at uevents."""

import contextlib
import ctypes
import fcntl
import mmap
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

BLKRRPART = 0x125F
NETLINK_KOBJECT_UEVENT = 15


def leave_with_io_in_flight(path: str, dice: random.Random) -> None:
    """A process that is killed while threads of it read and write nothing but its own last block."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(OSError):
            file = os.open(path, os.O_RDONLY | os.O_DIRECT)
            for _ in range(3):
                if os.fork() == 0:
                    break
            memory = mmap.mmap(-1, 65536)
            signal.alarm(30)
            while True:
                os.preadv(file, [memory], dice.randrange(16) * 65536)
        os._exit(0)
    time.sleep(dice.random() * 0.2)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def close_with_aio_in_flight(path: str, dice: random.Random) -> None:
    """A process that submits reads with io_submit and exits at once."""
    libc = ctypes.CDLL(None, use_errno=True)
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(OSError):
            file = os.open(path, os.O_RDONLY | os.O_DIRECT)
            memory = mmap.mmap(-1, 1 << 20)
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            context = ctypes.c_ulong()
            libc.syscall(206, 16, ctypes.byref(context))
            blocks = [iocb(file, address + index * 65536, 65536, dice.randrange(16) * 65536) for index in range(16)]
            pointers = (ctypes.c_void_p * 16)(*(ctypes.addressof(block) for block in blocks))
            libc.syscall(209, context, ctypes.c_long(16), pointers)
        os._exit(0)
    os.waitpid(pid, 0)


def iocb(file: int, address: int, length: int, offset: int) -> ctypes.Array:
    """A `struct iocb` for a read."""
    block = (ctypes.c_ubyte * 64)()
    memory = memoryview(block).cast("B")
    memory[20:24] = file.to_bytes(4, "little")
    memory[24:32] = address.to_bytes(8, "little")
    memory[32:40] = length.to_bytes(8, "little")
    memory[40:48] = offset.to_bytes(8, "little")
    return block


def reread_partitions(path: str, _dice: random.Random) -> None:
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_RDONLY)
        try:
            fcntl.ioctl(file, BLKRRPART)
        finally:
            os.close(file)


def open_and_close(path: str, _dice: random.Random) -> None:
    with contextlib.suppress(OSError):
        for _ in range(10):
            os.close(os.open(path, os.O_RDWR | os.O_EXCL if _dice.random() < 0.3 else os.O_RDONLY))


WAYS = (leave_with_io_in_flight, close_with_aio_in_flight, reread_partitions, open_and_close)


def listen(parent: int) -> None:
    """Opens and reads every disk of ours at its uevents."""
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_KOBJECT_UEVENT)
    events.bind((0, 1))
    events.settimeout(1)
    while os.getppid() == parent:
        try:
            fields = events.recv(8192).decode(errors="replace").split("\0")
        except OSError:
            continue
        name = next((field[8:] for field in fields if field.startswith("DEVNAME=ublkb")), None)
        if name:
            with contextlib.suppress(OSError):
                file = os.open(f"/dev/{name}", os.O_RDONLY)
                try:
                    os.pread(file, 4096, 0)
                finally:
                    os.close(file)


def main() -> None:
    """Annoys one disk, or listens, until it is killed or its parent has ended."""
    parent = os.getppid()
    if sys.argv[1] == "listen":
        listen(parent)
        return
    path, dice = sys.argv[1], random.Random(sys.argv[2])
    while os.getppid() == parent:
        if Path(path).exists():
            dice.choice(WAYS)(path, dice)
        time.sleep(dice.random() * 0.1)


if __name__ == "__main__":
    main()
