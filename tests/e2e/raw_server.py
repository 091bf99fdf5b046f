# SPDX-License-Identifier: MIT OR Apache-2.0
"""A ublk server that speaks the driver's protocol itself, for tests of what servers can do to the driver.

Argument: a JSON object with the fields of `Options`. Prints the device's number, then, when it serves, the process
that does and the keeper; then it answers Python expressions over `server`, one JSON line each. A read of the sector
`hold` is kept until `server.release()`.
"""

import ctypes
import json
import mmap
import os
import select
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import NoReturn

from support.raw import (
    BATCH_IO,
    BUFFER_BYTES,
    CHAR_DEVICE,
    COMMIT,
    COMMIT_BATCH,
    FETCH,
    FETCH_BATCH,
    PREPARE_BATCH,
    Control,
    Ring,
    address_of,
    describe,
)

DESCRIPTOR_BYTES = 24
READ, WRITE = 0, 1
MAP_FIXED = 0x10
USERFAULTFD, UFFDIO_API, UFFDIO_REGISTER = 323, 0xC018AA3F, 0xC020AA00


@dataclass
class Options:
    flags: int = 0
    depth: int = 8
    sectors: int = 1 << 16
    # As for `Control.set_parameters`.
    discard: tuple[int, int, int] | None = None
    can_discard: bool = True
    hold: int = 8 * 55
    # Writes are kept, too, and not answered before `server.release_writes()`.
    hold_writes: bool = False
    uid: int = 0
    # The process that has opened the device leaves it to a child, which serves.
    in_child: bool = False
    # A child keeps the char device open, and does nothing.
    keeper: bool = False
    # With BATCH_IO: the tags are prepared, and no request is fetched.
    prepare_only: bool = False
    # The number of a device of which the char device is opened and registered in a ring, and no more.
    only_opens: int | None = None
    # The number of a device that another process has added, with the same flags and depth.
    serves: int | None = None


@dataclass
class Server:
    options: Options
    control: Control
    id: int
    keeper: int = 0
    held: list[int] = field(default_factory=list)
    stuck: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fd = os.open(CHAR_DEVICE.format(self.id), os.O_RDWR | os.O_CLOEXEC)

    @property
    def batch(self) -> bool:
        return bool(self.options.flags & BATCH_IO)

    def prepare(self) -> None:
        """Fetch all tags, in the process that is to serve."""
        depth = self.options.depth
        self.descriptors = mmap.mmap(self.fd, -(-depth * DESCRIPTOR_BYTES // 4096) * 4096, prot=mmap.PROT_READ)
        self.memory = mmap.mmap(-1, depth * BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.buffers = address_of(self.memory)
        self.ring = Ring(max(64, 2 * depth))
        if self.batch:
            self.ring.provide_buffers(64, 256)
            self._batch_command(PREPARE_BATCH, [self._element(tag, 0) for tag in range(depth)])
            if not self.options.prepare_only:
                self.ring.fetch_multishot(self.fd, FETCH_BATCH)
        else:
            for tag in range(depth):
                self._command(FETCH, tag, 0)
        self.ring.enter()

    def resize(self, sectors: int) -> int:
        """Change the size of the disk; the errno, or 0."""
        try:
            self.control.update_size(self.id, sectors)
        except OSError as error:
            return error.errno or -1
        return 0

    def make_unreachable(self) -> None:
        """Have faults on the memory for data wait for a handler, which there is not."""
        assert not self.held
        self.memory.madvise(mmap.MADV_DONTNEED)
        self.faults = ctypes.CDLL(None).syscall(USERFAULTFD, os.O_CLOEXEC)
        assert self.faults >= 0
        for request, argument in (
            (UFFDIO_API, (ctypes.c_uint64 * 3)(0xAA)),
            (UFFDIO_REGISTER, (ctypes.c_uint64 * 4)(self.buffers, len(self.memory), 1)),
        ):
            assert ctypes.CDLL(None).ioctl(self.faults, ctypes.c_ulong(request), argument) == 0

    def use_file(self, path: str) -> None:
        """Put a file in the place of the memory for data."""
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        size = ctypes.c_size_t(len(self.memory))
        place = ctypes.c_void_p(self.buffers)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | MAP_FIXED
        assert libc.mmap(place, size, protection, flags, fd, ctypes.c_long(0)) == self.buffers
        # Without read-ahead a fault waits for the file system itself, which SIGKILL does not end.
        assert libc.madvise(place, size, mmap.MADV_RANDOM) == 0

    def commit_in_thread(self, path: str) -> None:
        """Answer the read that is held by another thread, with data of a file."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        # Kept: the thread's command must find it mapped.
        self.file_memory = mmap.mmap(fd, BUFFER_BYTES)
        self.file_memory.madvise(mmap.MADV_RANDOM)
        element = (self.held[0], 4096, address_of(self.file_memory))
        threading.Thread(target=self._commit_once, args=[element], daemon=True).start()

    def commit_again(self) -> int:
        """Answer the same read once more; what the command ends with."""
        return self._commit_once(self._element(self.held.pop(), 4096))

    def _commit_once(self, element: tuple[int, int, int]) -> int:
        ring = Ring(8)
        ring.queue_batch(self.fd, COMMIT_BATCH, [element])
        ring.enter(1)
        ((_, result, _),) = ring.completions()
        return result

    def _buffer(self, tag: int) -> int:
        return self.buffers + tag * BUFFER_BYTES

    def _command(self, command: int, tag: int, result: int) -> None:
        self.ring.queue_io(self.fd, command, tag, result, self._buffer(tag))

    def _element(self, tag: int, result: int) -> tuple[int, int, int]:
        return tag, result, self._buffer(tag)

    def _batch_command(self, command: int, elements: list[tuple[int, int, int]]) -> None:
        self.ring.queue_batch(self.fd, command, elements)

    def request(self, tag: int) -> tuple[int, int, int]:
        """Operation, sectors and first sector of the request in a tag."""
        return describe(self.descriptors, tag * DESCRIPTOR_BYTES)

    def serve(self) -> None:
        """Answer what has come."""
        self.ring.enter()
        for tag in self.ring.tags():
            operation, _sectors, start = self.request(tag)
            if operation == READ and start == self.options.hold:
                self.held.append(tag)
            elif operation == WRITE and self.options.hold_writes:
                self.stuck.append(tag)
            else:
                self.commit(tag)
        self.ring.enter()

    def commit(self, tag: int) -> None:
        operation, sectors, _start = self.request(tag)
        result = sectors * 512 if operation in (READ, WRITE) else 0
        if self.batch:
            self._batch_command(COMMIT_BATCH, [self._element(tag, result)])
        else:
            self._command(COMMIT, tag, result)

    def release_part(self) -> None:
        """Answer the first sector of the read that is held; the driver sends the rest again."""
        tag = self.held.pop()
        _operation, _sectors, start = self.request(tag)
        self.options.hold = start + 1
        if self.batch:
            self._batch_command(COMMIT_BATCH, [self._element(tag, 512)])
        else:
            self._command(COMMIT, tag, 512)
        self.ring.enter()

    def release_and_hang(self, path: str) -> None:
        """Answer the read that is held in a system call that then waits for the content of a file."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.file_memory = mmap.mmap(fd, 4096)
        self.file_memory.madvise(mmap.MADV_RANDOM)
        self.pipe = os.pipe()
        self.commit(self.held.pop())
        self.ring.queue_write(self.pipe[1], address_of(self.file_memory), 1)
        self.ring.enter()

    def release(self) -> int:
        """Answer what is held; how many that were."""
        count = len(self.held)
        for tag in self.held:
            self.commit(tag)
        self.held.clear()
        self.ring.enter()
        return count

    def release_writes(self) -> int:
        """Answer the writes that are held; how many those were."""
        count = len(self.stuck)
        for tag in self.stuck:
            self.commit(tag)
        self.stuck.clear()
        self.ring.enter()
        return count


def main() -> None:
    options = Options(**json.loads(sys.argv[1]))
    if options.uid:
        os.setresgid(options.uid, options.uid, options.uid)
        os.setresuid(options.uid, options.uid, options.uid)
    if options.only_opens is not None:
        open_only(options.only_opens)
    control = Control()
    number = control.add(options.flags, options.depth) if options.serves is None else options.serves
    print(number, flush=True)
    wait_for_node(CHAR_DEVICE.format(number))
    control.set_parameters(number, options.sectors, options.discard, can_discard=options.can_discard)
    server = Server(options, control, number)
    opener = os.getpid()
    if options.keeper and (child := os.fork()) == 0:
        signal.pause()
    elif options.keeper:
        server.keeper = child
    if not options.in_child:
        server.prepare()
        control.start(number, opener)
    elif os.fork() == 0:
        server.prepare()
        control = Control()
        control.start(number, opener)
        os.kill(opener, signal.SIGKILL)
    else:
        signal.pause()
    print(json.dumps({"pid": os.getpid(), "keeper": server.keeper}), flush=True)
    answer(server)


def open_only(number: int) -> NoReturn:
    ring = Ring(8)
    ring.register_file(os.open(CHAR_DEVICE.format(number), os.O_RDWR))
    print("open", flush=True)
    while True:
        signal.pause()


def wait_for_node(path: str) -> None:
    """Until this process may use a device's node, which udev gives it."""
    deadline = time.monotonic() + 30
    while not os.access(path, os.R_OK | os.W_OK):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} is not there for this user")
        time.sleep(0.01)


def answer(server: Server) -> None:
    pending = b""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(server.ring.fd, select.POLLIN)
    while True:
        for fd, _events in poll.poll(50):
            if fd != 0:
                continue
            chunk = os.read(0, 4096)
            if not chunk:
                return
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                print(json.dumps(eval(line, {"server": server, "os": os})), flush=True)
        server.serve()


if __name__ == "__main__":
    main()
