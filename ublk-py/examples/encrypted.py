# SPDX-License-Identifier: MIT OR Apache-2.0

"""Disk in a file that is encrypted block by block with AES-XTS (needs the package ``cryptography``).

Run it with ``ublk run encrypted.py:Encrypted -a path=disk.img -a key_file=key``; create the key with
``head -c 64 /dev/urandom > key``.
"""

import os
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import XTS

import ublk

BLOCK = 4096


class Encrypted(ublk.BlockDevice):
    """Disk with the decrypted content of a file."""

    def __init__(self, path, key_file):
        self.file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.file_sync = ublk.FileSync(self.file)
        self.key = Path(key_file).read_bytes()
        if len(self.key) != 64:
            raise ValueError(f"{key_file} has {len(self.key)} bytes; a key of AES-256-XTS has 64")
        super().__init__(size=os.fstat(self.file).st_size // BLOCK * BLOCK, block_size=BLOCK)

    def blocks(self, offset, data):
        """Yield the cipher of each block, whose tweak is the block number, and the slice of the block in the data."""
        for at in range(0, len(data), BLOCK):
            tweak = ((offset + at) // BLOCK).to_bytes(16, "little")
            yield Cipher(AES(self.key), XTS(tweak)), slice(at, at + BLOCK)

    def read(self, offset, buf):
        if os.preadv(self.file, [buf], offset) != len(buf):
            raise EOFError(f"the file has become too short for {offset}+{len(buf)}")
        for cipher, place in self.blocks(offset, buf):
            buf[place] = cipher.decryptor().update(buf[place])

    def write(self, offset, buf):
        secret = bytearray(len(buf))
        for cipher, place in self.blocks(offset, buf):
            secret[place] = cipher.encryptor().update(buf[place])
        return os.pwrite(self.file, secret, offset)

    def flush(self):
        self.file_sync.sync()
