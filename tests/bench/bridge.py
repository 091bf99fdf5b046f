# SPDX-License-Identifier: MIT OR Apache-2.0
"""What Python costs per request, by the style of its handlers, without a kernel.

    PYTHON tests/bench/bridge.py [--requests N] [--depth N] [--rounds N] [--json FILE]

PYTHON is an interpreter that has this project's package. A stand-in for the driver in the same process sends reads of 4 KiB,
`depth` at a time. Measured are the processor time of all threads but the client's, the least of some rounds, and, by
glibc's libmemusage, calls of malloc, calloc and realloc, of which the client's are part; what a disk in Rust that does
nothing takes in the same way is told first and is subtracted from the others.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import ublk
from ublk._ublk import FakeDriver

SIZE = 64 << 20
COUNTER = "libmemusage.so"


class Methods(ublk.BlockDevice):
    """A plain method."""

    def read(self, offset, buf):
        pass


class Ram(ublk.BlockDevice):
    """A plain method that copies."""

    def __init__(self, size):
        super().__init__(size=size)
        self.memory = memoryview(bytearray(size))

    def read(self, offset, buf):
        buf[:] = self.memory[offset : offset + len(buf)]


class Batch(ublk.BlockDevice):
    """All requests of a wake-up."""

    def handle(self, requests):
        for request in requests:
            request.complete()


class Tasks(ublk.BlockDevice):
    """A coroutine."""

    async def read(self, offset, buf):
        pass


class Mapped(ublk.BlockDevice):
    """An extent for ever: Python is asked once."""

    def __init__(self, size):
        super().__init__(size=size)
        self.file = os.memfd_create("bridge")
        os.ftruncate(self.file, size)

    def map(self, op, offset, length):
        return ublk.Extent(self.file, 0, self.size, start=0, stable=True)


# Name, class, and how it is started.
STYLES = {
    "native": (ublk.Null, {}),
    "map, stable extent": (Mapped, {}),
    "handle": (Batch, {}),
    "read": (Methods, {}),
    "read that copies 4 KiB": (Ram, {}),
    "read, workers=2": (Methods, {"workers": 2}),
    "async read": (Tasks, {}),
}


def serve(style, rounds, requests, depth):
    """Nanoseconds per request: the least of some rounds."""
    kind, how = STYLES[style]
    driver = FakeDriver()
    disk = kind(SIZE) if kind in (Ram, Mapped, ublk.Null) else kind(size=SIZE)
    found = []
    with disk.start(depth=depth, **how, _driver=driver) as device:
        driver.load(device.id, depth * 4, depth)
        for _ in range(rounds):
            began = time.process_time_ns() - time.thread_time_ns()
            driver.load(device.id, requests, depth)
            found.append((time.process_time_ns() - time.thread_time_ns() - began) / requests)
    return min(found)


def allocations(style, requests, depth):
    """Calls of the allocator per request: those of two runs of different length, subtracted."""

    def calls(count):
        environment = os.environ | {"LD_PRELOAD": COUNTER, "PYTHONMALLOC": "malloc"}
        argv = [sys.executable, __file__, "--alone", style, "--requests", str(count), "--depth", str(depth)]
        said = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stderr
        lines = re.findall(r"^\s*(malloc|realloc|calloc)\|\s*(\d+)", re.sub(r"\x1b\[[0-9;]*m", "", said), re.MULTILINE)
        if not lines:
            raise RuntimeError(f"{COUNTER} says nothing: {said!r}")
        return sum(int(count) for _, count in lines)

    return (calls(3 * requests) - calls(requests)) / (2 * requests)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", choices=list(STYLES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        serve(options.alone, 1, options.requests, options.depth)
        return
    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    conditions = {
        "python": platform.python_version() + ("t" if free_threaded else ""),
        "gil": getattr(sys, "_is_gil_enabled", lambda: True)(),
        "cpus": os.cpu_count(),
        "depth": options.depth,
        "requests": options.requests,
        "rounds": options.rounds,
    }
    print(
        "    " + json.dumps(conditions) + "\n\n| handler | ns per request | allocations per request |\n|---|---:|---:|"
    )
    results, base = {}, None
    for style in STYLES:
        took = serve(style, options.rounds, options.requests, options.depth)
        made = allocations(style, options.requests // 10, options.depth)
        results[style] = {"ns": took, "allocations": made}
        if base is None:
            base = results[style]
            print(f"| {style} | {took:,.0f} | {made:.1f} |")
        else:
            print(f"| {style} | +{took - base['ns']:,.0f} | {made - base['allocations']:+.1f} |")
    if options.json:
        options.json.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
