# SPDX-License-Identifier: MIT OR Apache-2.0
"""Reads and writes with protection information of one's own, which only io_uring takes (Linux 6.14).

Layouts: `linux/io_uring.h`.
"""

import ctypes
import errno
import mmap
import os
import struct

from .raw import system_call

_SETUP, _ENTER = 425, 426
_ENTER_GETEVENTS = 1
_OFFSET_SUBMISSIONS, _OFFSET_COMPLETIONS, _OFFSET_ENTRIES = 0, 0x8000000, 0x10000000
_FEATURE_ATTRIBUTES = 1 << 16
_READ, _WRITE = 22, 23
_ATTRIBUTE_PI = 1

_PARAMETERS = struct.Struct("=7I3I40s40s")
_OFFSETS = struct.Struct("=8IQ")
# opcode, flags, priority, fd, offset, address, length, rw_flags, user_data, buffer, personality, splice_fd, the
# address of attributes, their kinds.
_SUBMISSION = struct.Struct("=BBHiQQIIQHHiQQ")
_COMPLETION = struct.Struct("=QiI")
# flags, application tag, length, address, seed, reserved.
_PI = struct.Struct("=HHIQQQ")


class Ring:
    """One request at a time, each waited for."""

    def __init__(self) -> None:
        parameters = ctypes.create_string_buffer(_PARAMETERS.size)
        self.fd = system_call(_SETUP, ctypes.c_uint(1), parameters)
        fields = _PARAMETERS.unpack(parameters.raw)
        entries, completions, self._features = fields[0], fields[1], fields[5]
        sq, cq = _OFFSETS.unpack(fields[10]), _OFFSETS.unpack(fields[11])
        self._sq_tail, self._sq_mask, self._sq_array = sq[1], sq[2], sq[6]
        self._cq_head, self._cq_mask, self._cqes = cq[0], cq[2], cq[5]
        self._sq = mmap.mmap(self.fd, sq[6] + entries * 4, offset=_OFFSET_SUBMISSIONS)
        self._cq = mmap.mmap(self.fd, cq[5] + completions * _COMPLETION.size, offset=_OFFSET_COMPLETIONS)
        self._sqes = mmap.mmap(self.fd, entries * _SUBMISSION.size, offset=_OFFSET_ENTRIES)

    def __enter__(self) -> "Ring":
        return self

    def __exit__(self, *_: object) -> None:
        for mapping in (self._sq, self._cq, self._sqes):
            mapping.close()
        os.close(self.fd)

    @property
    def takes_metadata(self) -> bool:
        """Whether the kernel lets clients bring metadata."""
        return bool(self._features & _FEATURE_ATTRIBUTES)

    def write(self, fd: int, offset: int, data: bytes, metadata: bytes, *, seed: int) -> None:
        self._transfer(_WRITE, fd, offset, data, metadata, seed)

    def read(self, fd: int, offset: int, length: int, metadata_length: int, *, seed: int) -> tuple[bytes, bytes]:
        """The data and its metadata."""
        return self._transfer(_READ, fd, offset, bytes(length), bytes(metadata_length), seed)

    def _transfer(
        self, opcode: int, fd: int, offset: int, data: bytes, metadata: bytes, seed: int
    ) -> tuple[bytes, bytes]:
        memory, extra = mmap.mmap(-1, len(data)), mmap.mmap(-1, len(metadata))
        memory[:], extra[:] = data, metadata
        places = [ctypes.c_char.from_buffer(area) for area in (memory, extra)]
        attribute = ctypes.create_string_buffer(
            _PI.pack(0, 0, len(metadata), ctypes.addressof(places[1]), seed, 0), _PI.size
        )
        entry = _SUBMISSION.pack(
            *(opcode, 0, 0, fd, offset, ctypes.addressof(places[0]), len(data), 0, 1, 0, 0, 0),
            *(ctypes.addressof(attribute), _ATTRIBUTE_PI),
        )
        result = self._submit(entry)
        del places
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        if result != len(data):
            raise OSError(errno.EIO, f"{result} of {len(data)} bytes were transferred")
        return bytes(memory), bytes(extra)

    def _submit(self, entry: bytes) -> int:
        (tail,) = struct.unpack_from("=I", self._sq, self._sq_tail)
        (mask,) = struct.unpack_from("=I", self._sq, self._sq_mask)
        index = tail & mask
        self._sqes[index * _SUBMISSION.size : (index + 1) * _SUBMISSION.size] = entry
        struct.pack_into("=I", self._sq, self._sq_array + index * 4, index)
        struct.pack_into("=I", self._sq, self._sq_tail, (tail + 1) & 0xFFFFFFFF)
        none = ctypes.c_void_p()
        system_call(
            _ENTER,
            ctypes.c_uint(self.fd),
            ctypes.c_uint(1),
            ctypes.c_uint(1),
            ctypes.c_uint(_ENTER_GETEVENTS),
            none,
            none,
        )
        (head,) = struct.unpack_from("=I", self._cq, self._cq_head)
        (mask,) = struct.unpack_from("=I", self._cq, self._cq_mask)
        _, result, _ = _COMPLETION.unpack_from(self._cq, self._cqes + (head & mask) * _COMPLETION.size)
        struct.pack_into("=I", self._cq, self._cq_head, (head + 1) & 0xFFFFFFFF)
        return result
