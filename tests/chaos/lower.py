# SPDX-License-Identifier: MIT OR Apache-2.0
"""Serves a disk with a volatile write cache and keeps a log of what reaches it, for disks of ours to stand on.

Argument: a JSON object with `size`, `block_size`, `slow` (the longest delay of a request in milliseconds, 0 for none)
and `seed`. Prints the path. Each line on standard input is an object with one key:

* `log`: writes the log to the file of that name, and begins a new one with the present content as its base;
* `fail`: from now on requests of this kind (`read`, `write`, `flush`) fail with EIO; null ends that;

and gets a line of JSON. The end of input ends the disk.
"""

import errno
import json
import logging
import pickle
import random
import sys
import threading
import time

import ublk

WORKERS = 8


class Lower(ublk.BlockDevice):
    """A RAM disk that remembers the order of writes and flushes."""

    def __init__(self, size: int, block_size: int, slow: int, seed: int) -> None:
        super().__init__(size=size, block_size=block_size)
        self.data = bytearray(size)
        self.base = bytes(size)
        self.entries: list[tuple[int, int, int, bytes | None]] = []
        self.failing: str | None = None
        self.lock = threading.Lock()
        self.slow = slow / 1000
        self.dice = random.Random(seed)

    def wait(self, kind: str) -> int:
        began = time.monotonic_ns()
        if self.slow and self.dice.random() < 0.3:
            time.sleep(self.dice.random() * self.slow)
        if self.failing == kind:
            raise OSError(errno.EIO, f"{kind} fails on request")
        return began

    def read(self, offset, buf):
        self.wait("read")
        with self.lock:
            buf[:] = self.data[offset : offset + len(buf)]

    def put(self, offset, data):
        began = self.wait("write")
        with self.lock:
            self.data[offset : offset + len(data)] = data
            self.entries.append((began, time.monotonic_ns(), offset, data))

    def write(self, offset, buf):
        self.put(offset, bytes(buf))

    def write_zeroes(self, offset, length):
        self.put(offset, bytes(length))

    def discard(self, offset, length):
        self.put(offset, bytes(length))

    def flush(self):
        began = self.wait("flush")
        with self.lock:
            self.entries.append((began, time.monotonic_ns(), 0, None))

    def save(self, path: str) -> int:
        with self.lock:
            entries, self.entries = self.entries, []
            base, self.base = self.base, bytes(self.data)
        with open(path, "wb") as file:
            pickle.dump((base, entries), file)
        return len(entries)


def main() -> None:
    logging.basicConfig(format="%(levelname)s:%(name)s:%(message)s", level=logging.WARNING)
    wanted = json.loads(sys.argv[1])
    disk = Lower(**wanted)
    with disk.start(queues=1, **({"workers": WORKERS} if wanted["slow"] else {})) as device:
        print(json.dumps(device.path), flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            if "log" in asked:
                answer = disk.save(asked["log"])
            else:
                answer = disk.failing = asked["fail"]
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
