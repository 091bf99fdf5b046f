# SPDX-License-Identifier: MIT OR Apache-2.0
"""Bytes of sectors that say which sector they belong to and which write they come from."""

import hashlib
import struct

SECTOR = 512
_HEADER = struct.Struct("<8sQQQ32x")
_MAGIC = b"ublkchao"
ZEROS = bytes(SECTOR)


def sector(run: int, number: int, version: int) -> bytes:
    """The content of one sector after its write number `version`."""
    header = _HEADER.pack(_MAGIC, run, number, version)
    return header + hashlib.blake2b(header, digest_size=64).digest() * 7


def sectors(run: int, first: int, count: int, version: int) -> bytes:
    """The content of `count` sectors from `first` on."""
    return b"".join(sector(run, number, version) for number in range(first, first + count))


def version_of(run: int, number: int, data: bytes) -> int | None:
    """The write that a sector's content comes from: 0 for zeros, None for what no write of this run put there."""
    if data == ZEROS:
        return 0
    magic, its_run, its_number, version = _HEADER.unpack_from(data)
    if magic != _MAGIC or its_run != run or its_number != number or data != sector(run, number, version):
        return None
    return version


def describe(data: bytes) -> str:
    """What a sector holds, for a report."""
    if data == ZEROS:
        return "zeros"
    magic, run, number, version = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        return f"foreign bytes {data[:16].hex()}"
    whole = "" if data == sector(run, number, version) else ", with a damaged rest"
    return f"version {version} of sector {number} of run {run}{whole}"
