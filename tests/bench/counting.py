# SPDX-License-Identifier: MIT OR Apache-2.0
"""Counts instructions in windows of a fixed number of requests.

The client is `ublk bench`, which marks the ends of each window for the plugin that counts (vm/counter). A mark with the
number `ATTEMPT` precedes each run of a client, so that a run that fails does not shift the windows of later ones.
"""

import contextlib
import ctypes
import json
import mmap
import subprocess

# Number of the mark that precedes each client.
ATTEMPT = 3
WINDOWS = 3
ATTEMPTS = 2
# Seconds for one client. An emulated machine executes some ten million instructions per second.
PATIENCE = 1800


class Failed(Exception):
    """A measurement without a result; the text is the reason."""


class Marks:
    """Marks for the plugin: instructions without an effect.

    `attempt` is the number of the last client, from 0.
    """

    def __init__(self):
        self.attempt = -1

    def begin(self):
        """A new client begins."""
        self.attempt += 1
        self.make(ATTEMPT)

    def make(self, number=0):
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        # nop [rax + 0x75626c00 + number], ret
        page[:8] = bytes.fromhex(f"0f1f80{number:02x}6c6275c3")
        ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()

    @contextlib.contextmanager
    def around(self):
        """One window, of a client that makes no marks."""
        self.begin()
        self.make()
        try:
            yield
        finally:
            self.make()


def windows(marks):
    """The windows of each client: a list for each, of the instructions of kernel and user."""
    attempts = []
    for line in marks.read_text().splitlines():
        number, *counts = map(int, line.split())
        if number == ATTEMPT:
            attempts.append([])
        elif attempts:
            attempts[-1].append(counts)
    # The last window of a client that failed may have no end.
    return [[(b[0] - a[0], b[1] - a[1]) for a, b in zip(made[::2], made[1::2], strict=False)] for made in attempts]


def requests_of_window(options):
    """How many requests make an average, in a time that emulation allows."""
    if options["bs"] != "4k":
        return 2000
    return 4000 if options["iodepth"] == 1 else 12800


def count(path, job, options, marks):
    """Count the windows of one job on a disk. Repeated once if it fails."""
    for attempt in range(ATTEMPTS):
        try:
            return _count(path, job, options, marks)
        except Failed as why:
            if attempt + 1 == ATTEMPTS:
                raise Failed(f"{why} ({ATTEMPTS} attempts)") from None


def _count(path, job, options, marks):
    requests = requests_of_window(options)
    argv = ["ublk", "bench", "--marks", "--json", "-", "--job", job, "--requests", str(requests)]
    argv += ["--windows", str(WINDOWS), *(["--write"] if not options["rw"].endswith("read") else []), path]
    marks.begin()
    try:
        ran = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise Failed(f"{job} did not end on {path} within {PATIENCE} s") from None
    try:
        found = json.loads(ran.stdout)["disks"][0]["jobs"][0]
    except (ValueError, LookupError):
        raise Failed(" ".join(ran.stderr.split()) or f"ublk bench ended with status {ran.returncode}") from None
    if found["failed"] or len(found["windows"]) != WINDOWS:
        raise Failed(found["failed"] or f"{len(found['windows'])} windows of {WINDOWS}")
    return {"attempt": marks.attempt, "requests": requests}
