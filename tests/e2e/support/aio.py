# SPDX-License-Identifier: MIT OR Apache-2.0
"""Asynchronous reads by the kernel's own AIO, which keep their file open until they end."""

import ctypes
import mmap
import struct

from .pace import patience
from .raw import address_of, system_call

_SETUP, _DESTROY, _GETEVENTS, _SUBMIT = 206, 207, 208, 209
_PREAD = 0
# data, key, flags, opcode, priority, fd, buffer, length, offset, reserved, flags, eventfd
_REQUEST = struct.Struct("=QIIHhIQQqQII")


class Aio:
    """One read at a time."""

    def __enter__(self) -> "Aio":
        self._context = ctypes.c_ulong()
        self._memory = mmap.mmap(-1, 64 << 10)
        system_call(_SETUP, ctypes.c_long(1), ctypes.byref(self._context))
        return self

    def __exit__(self, *_: object) -> None:
        system_call(_DESTROY, self._context)

    def read(self, fd: int, offset: int, length: int) -> None:
        """Begin to read; `fd` may be closed at once."""
        packed = _REQUEST.pack(0, 0, 0, _PREAD, 0, fd, address_of(self._memory), length, offset, 0, 0, 0)
        self._request = ctypes.create_string_buffer(packed, len(packed))
        pointer = (ctypes.c_void_p * 1)(ctypes.addressof(self._request))
        system_call(_SUBMIT, self._context, ctypes.c_long(1), pointer)

    def result(self) -> int:
        """Wait for the read; the bytes read, or a negative errno."""
        event = ctypes.create_string_buffer(32)
        limit = ctypes.create_string_buffer(struct.pack("=qq", int(patience(30)), 0), 16)
        one = ctypes.c_long(1)
        assert system_call(_GETEVENTS, self._context, one, one, event, limit) == 1, "the read does not end"
        return struct.unpack("=QQqq", event.raw)[2]
