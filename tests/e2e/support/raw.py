# SPDX-License-Identifier: MIT OR Apache-2.0
"""The driver's protocol without the engine: io_uring and ublk commands as bytes.

Layouts: `linux/io_uring.h`, and `kmod/include/uapi/linux/ublk_cmd.h`.
"""

import ctypes
import mmap
import os
import struct
from collections.abc import Callable

CONTROL = "/dev/ublk-control"
CHAR_DEVICE = "/dev/ublkc{}"
BLOCK_DEVICE = "/dev/ublkb{}"
BUFFER_BYTES = 64 << 10

USER_RECOVERY, USER_RECOVERY_REISSUE, UNPRIVILEGED_DEV = 1 << 3, 1 << 4, 1 << 5
QUIESCE = 1 << 12
BATCH_IO, NO_AUTO_PART_SCAN = 1 << 15, 1 << 18
QUIESCED = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_SETUP, _ENTER, _REGISTER = 425, 426, 427
_SETUP_SQE128, _ENTER_GETEVENTS, _REGISTER_FILES, _REGISTER_PBUF_RING = 1 << 10, 1, 2, 22
_OFFSET_SUBMISSIONS, _OFFSET_COMPLETIONS, _OFFSET_ENTRIES = 0, 0x8000000, 0x10000000
_URING_CMD, _WRITE, _BUFFER_SELECT, _CMD_MULTISHOT = 46, 23, 1 << 5, 1 << 1
_BUFFER_GROUP = 1

_PARAMETERS = struct.Struct("=7I3I40s40s")
_OFFSETS = struct.Struct("=8IQ")
_COMPLETION = struct.Struct("=QiI")
# opcode, flags, priority, fd, command, 0, address, length, command's flags, user_data, buffer or group, personality, 0
_SUBMISSION = struct.Struct("=BBHiIIQIIQHHi")
_IO = struct.Struct("=HHiQ")
_BATCH = struct.Struct("=HHHBBQ")
_ELEMENT = struct.Struct("=HHiQ")
# dev_id, queue_id, len, addr, data, dev_path_len, pad, reserved
_HEADER = struct.Struct("=IHHQQHHI")
# queues, depth, state, descriptor's size, max_io_buf_bytes, dev_id, pid, pad, flags, ublksrv_flags, uid, gid, reserved
_INFO = struct.Struct("=HHHHIIiIQQII16s")
# len, types, attrs, four shifts, max_sectors, chunk_sectors, dev_sectors, virt_boundary
_PARAMS = struct.Struct("=III4BIIQQ")
# alignment, granularity, most sectors of a discard, of write zeroes, segments, 0
_DISCARD = struct.Struct("=IIIIHH")
_PARAMS_BYTES = 152
_DESCRIPTOR = struct.Struct("=IIQQ")

# What the user data of a completion says that it is for, above the tag.
_OF_FETCH, _OF_BATCH, _OF_OTHER = 1 << 32, 1 << 33, 1 << 34


def _command(number: int, size: int, direction: int = 3) -> int:
    return direction << 30 | size << 16 | ord("u") << 8 | number


GET_DEV_INFO, GET_DEV_INFO2 = _command(0x02, 32, 2), _command(0x12, 32, 2)
ADD_DEV, DEL_DEV, START_DEV, STOP_DEV, SET_PARAMS = (_command(number, 32) for number in range(0x04, 0x09))
DEL_DEV_ASYNC = _command(0x14, 32, 2)
START_USER_RECOVERY, QUIESCE_DEV, TRY_STOP_DEV = (_command(number, 32) for number in (0x10, 0x16, 0x17))
UPDATE_SIZE = _command(0x15, 32)
FETCH, COMMIT = _command(0x20, 16), _command(0x21, 16)
PREPARE_BATCH, COMMIT_BATCH, FETCH_BATCH = (_command(number, 16) for number in range(0x25, 0x28))


def address_of(memory: mmap.mmap) -> int:
    """Where a writable mapping is; it must not be closed before the process ends."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def describe(descriptors: mmap.mmap, offset: int) -> tuple[int, int, int]:
    """Operation, sectors and first sector of a request."""
    flags, sectors, start, _address = _DESCRIPTOR.unpack_from(descriptors, offset)
    return flags & 0xFF, sectors, start


def system_call(number: int, *arguments: object) -> int:
    """The result of a system call that the C library has no function for; its errno as `OSError`."""
    result = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class Ring:
    """An io_uring instance of the thread that uses it."""

    def __init__(self, entries: int, *, wide: bool = False) -> None:
        parameters = bytearray(_PARAMETERS.size)
        struct.pack_into("=I", parameters, 8, _SETUP_SQE128 if wide else 0)
        raw = (ctypes.c_char * len(parameters)).from_buffer(parameters)
        self.fd = system_call(_SETUP, ctypes.c_uint(entries), raw)
        fields = _PARAMETERS.unpack(parameters)
        sq, cq = _OFFSETS.unpack(fields[10]), _OFFSETS.unpack(fields[11])
        self._entry_bytes = 128 if wide else 64
        self._sq_tail, self._sq_mask, self._sq_array = sq[1], sq[2], sq[6]
        self._cq_head, self._cq_tail, self._cq_mask, self._cqes = cq[0], cq[1], cq[2], cq[5]
        self._sq = mmap.mmap(self.fd, sq[6] + fields[0] * 4, offset=_OFFSET_SUBMISSIONS)
        self._cq = mmap.mmap(self.fd, cq[5] + fields[1] * _COMPLETION.size, offset=_OFFSET_COMPLETIONS)
        self._sqes = mmap.mmap(self.fd, fields[0] * self._entry_bytes, offset=_OFFSET_ENTRIES)
        self._queued = 0
        # Arrays that commands refer to.
        self._arrays: list[ctypes.Array] = []

    def queue(self, entry: bytes) -> None:
        """Put a submission into the ring, for the next `enter`."""
        (tail,) = struct.unpack_from("=I", self._sq, self._sq_tail)
        (mask,) = struct.unpack_from("=I", self._sq, self._sq_mask)
        index = tail & mask
        place = index * self._entry_bytes
        self._sqes[place : place + self._entry_bytes] = entry.ljust(self._entry_bytes, b"\0")
        struct.pack_into("=I", self._sq, self._sq_array + index * 4, index)
        struct.pack_into("=I", self._sq, self._sq_tail, (tail + 1) & 0xFFFFFFFF)
        self._queued += 1

    def enter(self, wait: int = 0) -> None:
        """Submit what is queued, and wait for so many completions."""
        queued, self._queued = self._queued, 0
        none = ctypes.c_void_p()
        numbers = map(ctypes.c_uint, (self.fd, queued, wait, _ENTER_GETEVENTS))
        system_call(_ENTER, *numbers, none, none)

    def completions(self) -> list[tuple[int, int, int]]:
        """User data, result and flags of all that has completed."""
        (head,) = struct.unpack_from("=I", self._cq, self._cq_head)
        (tail,) = struct.unpack_from("=I", self._cq, self._cq_tail)
        (mask,) = struct.unpack_from("=I", self._cq, self._cq_mask)
        found = [
            _COMPLETION.unpack_from(self._cq, self._cqes + (index & mask) * _COMPLETION.size)
            for index in range(head, head + (tail - head & 0xFFFFFFFF))
        ]
        struct.pack_into("=I", self._cq, self._cq_head, tail)
        return found

    def register_file(self, fd: int) -> None:
        """Have the ring refer to a file until the ring is torn down."""
        files = struct.pack("=i", fd)
        system_call(_REGISTER, ctypes.c_uint(self.fd), ctypes.c_uint(_REGISTER_FILES), files, ctypes.c_uint(1))

    def queue_write(self, fd: int, address: int, length: int) -> None:
        """A write of the process's memory to a file."""
        self.queue(_SUBMISSION.pack(_WRITE, 0, 0, fd, 0, 0, address, length, 0, _OF_OTHER, 0, 0, 0))

    def queue_io(self, fd: int, command: int, tag: int, result: int, address: int) -> None:
        """A command on one tag of queue 0."""
        entry = _SUBMISSION.pack(_URING_CMD, 0, 0, fd, command, 0, 0, 0, 0, tag, 0, 0, 0)
        self.queue(entry + _IO.pack(0, tag, result, address))

    def queue_batch(self, fd: int, command: int, elements: list[tuple[int, int, int]]) -> None:
        """PREP_IO_CMDS or COMMIT_IO_CMDS for tags of queue 0, with results and buffers."""
        packed = b"".join(_ELEMENT.pack(tag, 0, result, address) for tag, result, address in elements)
        array = (ctypes.c_char * len(packed)).from_buffer_copy(packed)
        self._arrays = [*self._arrays[-64:], array]
        entry = _SUBMISSION.pack(_URING_CMD, 0, 0, fd, command, 0, ctypes.addressof(array), 0, 0, _OF_BATCH, 0, 0, 0)
        self.queue(entry + _BATCH.pack(0, 1 << 1, len(elements), _ELEMENT.size, 0, 0))

    def provide_buffers(self, count: int, size: int) -> None:
        """Buffers that the kernel chooses from, for `fetch_multishot`."""
        self._table, self._chosen = mmap.mmap(-1, max(4096, count * 16)), mmap.mmap(-1, count * size)
        self._buffer_bytes, self._buffer_count, self._provided = size, count, 0
        registration = struct.pack("=QIHH24s", address_of(self._table), count, _BUFFER_GROUP, 0, b"")
        system_call(
            _REGISTER, ctypes.c_uint(self.fd), ctypes.c_uint(_REGISTER_PBUF_RING), registration, ctypes.c_uint(1)
        )
        for buffer in range(count):
            self._provide(buffer)

    def _provide(self, buffer: int) -> None:
        index = self._provided % self._buffer_count
        address = address_of(self._chosen) + buffer * self._buffer_bytes
        # The first entry's last field is the ring's tail.
        struct.pack_into("=QIH", self._table, index * 16, address, self._buffer_bytes, buffer)
        self._provided += 1
        struct.pack_into("=H", self._table, 14, self._provided & 0xFFFF)

    def fetch_multishot(self, fd: int, command: int) -> None:
        """FETCH_IO_CMDS for queue 0, which stays pending."""
        entry = _SUBMISSION.pack(
            *(_URING_CMD, _BUFFER_SELECT, 0, fd, command, 0, 0, 0, _CMD_MULTISHOT, _OF_FETCH, _BUFFER_GROUP, 0, 0)
        )
        self.queue(entry + _BATCH.pack(0, 0, 0, 2, 0, 0))

    def tags(self) -> list[int]:
        """Tags of requests that have arrived."""
        found = []
        for data, result, flags in self.completions():
            if data == _OF_FETCH and result > 0:
                buffer = flags >> 16
                found += struct.unpack_from(f"={result // 2}H", self._chosen, buffer * self._buffer_bytes)
                self._provide(buffer)
            elif data < _OF_FETCH and result == 0:
                found.append(data)
        return found


class Control:
    """Control commands of one thread."""

    def __init__(self) -> None:
        self._fd = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
        self._ring = Ring(4, wide=True)
        self._of_user = os.geteuid() != 0

    def __enter__(self) -> "Control":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._ring.fd)
        os.close(self._fd)

    def send(self, command: int, device: int, payload: bytes = b"", data: int = 0, *, by_path: bool = False) -> int:
        """Queue a command without waiting for it. The payload's address is kept alive."""
        path = CHAR_DEVICE.format(device).encode() + b"\0" if by_path else b""
        path = path.ljust(-(-len(path) // 8) * 8, b"\0")
        content = path + payload
        self._payload = ctypes.create_string_buffer(content, max(len(content), 1))
        self._path_bytes = len(path)
        address = ctypes.addressof(self._payload) if content else 0
        self._send_at(command, device, address, len(content), data, len(path))
        return len(content)

    def _send_at(
        self, command: int, device: int, address: int, length: int, data: int = 0, path_bytes: int = 0
    ) -> None:
        entry = _SUBMISSION.pack(_URING_CMD, 0, 0, self._fd, command, 0, 0, 0, 0, 0, 0, 0, 0)
        header = _HEADER.pack(device & 0xFFFFFFFF, 0xFFFF, length, address, data, path_bytes, 0, 0)
        self._ring.queue(entry + header)
        self._ring.enter()

    def command(
        self, command: int, device: int, payload: bytes = b"", data: int = 0, *, by_path: bool = False
    ) -> bytes:
        """Send a command and wait; the payload as the driver leaves it."""
        self.send(command, device, payload, data, by_path=by_path)
        self._ring.enter(1)
        ((_, result, _),) = self._ring.completions()
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return self._payload.raw[self._path_bytes : self._path_bytes + len(payload)]

    def add(self, flags: int, depth: int, queues: int = 1) -> int:
        """ADD_DEV; the device's number."""
        info = _INFO.pack(queues, depth, 0, 0, BUFFER_BYTES, 0xFFFFFFFF, 0, 0, flags, 0, 0, 0, b"")
        return _INFO.unpack(self.command(ADD_DEV, -1, info))[5]

    def send_add(self, flags: int, depth: int, number: int, memory: mmap.mmap, prepare: Callable[[], None]) -> None:
        """Queue an ADD_DEV of this number, which gets its arguments from a mapping and returns the result in it.

        `prepare` is called when the arguments are there.
        """
        memory[: _INFO.size] = _INFO.pack(1, depth, 0, 0, BUFFER_BYTES, number, 0, 0, flags, 0, 0, 0, b"")
        prepare()
        self._send_at(ADD_DEV, number, address_of(memory), _INFO.size)

    def info(self, device: int, *, by_path: bool = False) -> dict[str, int]:
        """GET_DEV_INFO."""
        command = GET_DEV_INFO2 if by_path else GET_DEV_INFO
        fields = _INFO.unpack(self.command(command, device, bytes(_INFO.size), by_path=by_path))
        return {"state": fields[2], "pid": fields[6], "flags": fields[8]}

    def set_parameters(
        self,
        device: int,
        sectors: int,
        discard: tuple[int, int, int] | None = None,
        *,
        can_discard: bool = True,
        longest: int = BUFFER_BYTES // 512,
    ) -> None:
        """SET_PARAMS of a plain disk; `discard` is the granularity and the most sectors to discard and to zero.

        Without `can_discard` these are there, but not among the types of parameters. `longest` is the most sectors of a
        request.
        """
        types = 1 if discard is None or not can_discard else 3
        packed = _PARAMS.pack(_PARAMS_BYTES, types, 0, *(9, 12, 12, 9), longest, 0, sectors, 0)
        if discard is not None:
            granularity, most, most_zeroes = discard
            packed += _DISCARD.pack(0, granularity, most, most_zeroes, 1, 0)
        self.command(SET_PARAMS, device, packed.ljust(_PARAMS_BYTES, b"\0"), by_path=self._of_user)

    def start(self, device: int, pid: int) -> None:
        """START_DEV."""
        self.command(START_DEV, device, data=pid, by_path=self._of_user)

    def update_size(self, device: int, sectors: int) -> None:
        """UPDATE_SIZE."""
        self.command(UPDATE_SIZE, device, data=sectors, by_path=self._of_user)

    def delete(self, device: int, *, by_path: bool = False) -> None:
        """DEL_DEV."""
        self.command(DEL_DEV, device, by_path=by_path)
