# SPDX-License-Identifier: MIT OR Apache-2.0
"""Measures the cost of Python per request, by the style of its handlers, without a kernel.

    PYTHON tests/bench/bridge.py [--requests N] [--depth N] [--rounds N] [--json FILE]

PYTHON is an interpreter that has this project's package. A stand-in for the driver in the same process sends reads of
4 KiB, `depth` at a time, and waits for all of them. The results per request are the time from the wake-up that brings
them until the completion of the last one is submitted (from the device's statistics, exact to a sixteenth; the minimum
of some rounds, on one CPU), and the calls of malloc, calloc and realloc, including the client's (by glibc's
libmemusage; objects of a free-threaded interpreter are allocated elsewhere and are not counted). The first line is a
disk in Rust that does nothing.
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

from handlers import Batch, Null, Sleeping, SleepingTasks, Tasks

import ublk
from ublk._driver import using
from ublk._ublk import FakeDriver

SIZE = 64 << 20
ALL_CPUS = os.sched_getaffinity(0)
COUNTER = "libmemusage.so"
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


class Ram(ublk.BlockDevice):
    """A plain method that copies."""

    def __init__(self, size):
        super().__init__(size=size)
        self.memory = memoryview(bytearray(size))

    def read(self, offset, buf):
        buf[:] = self.memory[offset : offset + len(buf)]


# Name, class, and how it is started.
STYLES = {
    "native": (ublk.Null, {}),
    "handle": (Batch, {}),
    "read": (Null, {}),
    "read that copies 4 KiB": (Ram, {}),
    "read, workers=2": (Null, {"workers": 2}),
    "async read": (Tasks, {}),
}


def serve(style, rounds, requests, depth):
    """Nanoseconds per request."""
    kind, how = STYLES[style]
    found = []
    # Client and server alternate.
    os.sched_setaffinity(0, {min(ALL_CPUS)})
    for _ in range(rounds):
        driver = FakeDriver()
        disk = kind(SIZE) if kind in (Ram, ublk.Null) else kind(size=SIZE)
        with using(driver), disk.start(depth=depth, **how) as device:
            driver.load(device.id, requests // depth, depth)
            # The 99th percentile: nearly all rounds, without the few that are disturbed.
            found.append(device.stats().operations["read"].p99 * 1e9 / depth)
    os.sched_setaffinity(0, ALL_CPUS)
    return min(found)


def allocations(style, requests, depth):
    """Allocator calls per request: the difference of two runs of different length."""

    def calls(count):
        environment = os.environ | {"LD_PRELOAD": COUNTER}
        if not FREE_THREADED:
            environment["PYTHONMALLOC"] = "malloc"
        argv = [sys.executable, __file__, "--alone", style, "--requests", str(count), "--depth", str(depth)]
        said = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stderr
        lines = re.findall(r"^\s*(malloc|realloc|calloc)\|\s*(\d+)", re.sub(r"\x1b\[[0-9;]*m", "", said), re.MULTILINE)
        if not lines:
            raise RuntimeError(f"{COUNTER} says nothing: {said!r}")
        return sum(int(count) for _, count in lines)

    return (calls(3 * requests) - calls(requests)) / (2 * requests)


def overlap(kind, depth, **how):
    """Requests per second of handlers that take 10 ms, with `depth` requests in flight."""
    driver = FakeDriver()
    with using(driver), kind(size=SIZE).start(depth=64, **how) as device:
        driver.load(device.id, 1, depth)
        began = time.monotonic()
        driver.load(device.id, 50, depth)
        return 50 * depth / (time.monotonic() - began)


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
    conditions = {
        "python": platform.python_version() + ("t" if FREE_THREADED else ""),
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
            print(f"| {style} | {took:,.0f} | {made - base['allocations']:+.1f} |")
    serial = overlap(Sleeping, 1)
    overlapping = {"workers=64": overlap(Sleeping, 64, workers=64), "async def": overlap(SleepingTasks, 64)}
    print(f"\nhandlers that take 10 ms, 64 requests at a time: {serial:.0f}/s one after the other", end="")
    for style, rate in overlapping.items():
        print(f", {rate:,.0f}/s with `{style}` ({rate / serial:.1f} times)", end="")
    print()
    results["overlap"] = {"serial": serial} | overlapping
    if options.json:
        options.json.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
