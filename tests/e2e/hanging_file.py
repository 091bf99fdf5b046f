# SPDX-License-Identifier: MIT OR Apache-2.0
"""A FUSE with one file, `file`, whose content never comes: a reader waits, also when killed, until this process ends.

Argument: where to mount it. Prints a line when it is mounted, and one for each read that has come.
Layouts: `linux/fuse.h`.
"""

import ctypes
import os
import struct
import sys

SIZE = 1 << 20
ROOT, FILE = 1, 2
LOOKUP, FORGET, GETATTR, OPEN, READ, RELEASE, FLUSH, INIT, INTERRUPT = 1, 2, 3, 14, 15, 18, 25, 26, 36
ENOENT, ENOSYS = 2, 38

# length, opcode, unique, node, uid, gid, pid, padding
_REQUEST = struct.Struct("=IIQQIIII")
# length, error, unique
_ANSWER = struct.Struct("=IiQ")
# node, size, blocks, three times and their nanoseconds, mode, links, uid, gid, rdev, block size, flags
_ATTRIBUTES = struct.Struct("=6Q10I")
# node, generation, entry's and attributes' validity, and their nanoseconds
_ENTRY = struct.Struct("=4QII")
# attributes' validity and its nanoseconds, padding
_VALIDITY = struct.Struct("=QII")
# major, minor, readahead, flags, background requests, when they are too many, max_write, and later additions
_INIT_ANSWER = struct.Struct("=4IHHI40s")
_OPEN_ANSWER = struct.Struct("=QII")


def attributes(node: int) -> bytes:
    mode = 0o040755 if node == ROOT else 0o100666
    return _ATTRIBUTES.pack(node, SIZE, SIZE // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def answer(opcode: int, node: int, body: bytes) -> bytes | int | None:
    """The answer to a request, or its errno; None if there is to be none."""
    if opcode == INIT:
        return _INIT_ANSWER.pack(7, 31, 0, 0, 12, 10, 1 << 17, b"")
    if opcode == LOOKUP:
        return _ENTRY.pack(FILE, 0, 1000, 1000, 0, 0) + attributes(FILE) if body == b"file\0" else ENOENT
    if opcode == GETATTR:
        return _VALIDITY.pack(1000, 0, 0) + attributes(node)
    if opcode == OPEN:
        return _OPEN_ANSWER.pack(1, 0, 0)
    if opcode in (RELEASE, FLUSH):
        return b""
    return None if opcode in (READ, FORGET, INTERRUPT) else ENOSYS


def main() -> None:
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"hanging", os.fsencode(sys.argv[1]), b"fuse", 0, options):
        raise OSError(ctypes.get_errno(), "mount")
    print("mounted", flush=True)
    while True:
        request = os.read(device, 1 << 18)
        _length, opcode, unique, node, *_ = _REQUEST.unpack_from(request)
        if opcode == READ:
            print("read", flush=True)
        reply = answer(opcode, node, request[_REQUEST.size :])
        if reply is None:
            continue
        error, content = (reply, b"") if isinstance(reply, int) else (0, reply)
        os.write(device, _ANSWER.pack(_ANSWER.size + len(content), -error, unique) + content)


if __name__ == "__main__":
    main()
