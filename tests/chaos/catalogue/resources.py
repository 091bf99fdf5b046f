# SPDX-License-Identifier: MIT OR Apache-2.0
"""Handlers that use up or close what their process has."""

import contextlib
import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

from .case import EITHER, MAY_END, RIGHT, case, right


@case(EITHER, MAY_END, needs_kernel=True)
def closes_all_descriptors(disk, op, offset, buf):
    os.closerange(3, 4096)
    right(disk, op, offset, buf)


@case(RIGHT)
def closes_its_standard_streams(disk, op, offset, buf):
    null = os.open("/dev/null", os.O_RDWR)
    for number in (1, 2):
        os.dup2(null, number)
    sys.stdout = sys.stderr = None  # type: ignore[assignment]
    right(disk, op, offset, buf)


@case()
def uses_a_closed_descriptor(*_):
    read, write = os.pipe()
    os.close(read)
    os.close(write)
    os.read(read, 1)


@case(RIGHT, needs_kernel=True)
def uses_up_all_descriptors(disk, op, offset, buf):
    with contextlib.suppress(OSError):
        while True:
            disk.kept.append(os.open("/dev/null", os.O_RDONLY))
    right(disk, op, offset, buf)


@case()
def allocates_too_much(*_):
    bytearray(1 << 50)


@case(EITHER, MAY_END, needs_kernel=True)
def has_no_memory_left(disk, op, offset, buf):
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 20, before[1]))
    try:
        bytearray(16 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@case(RIGHT, needs_kernel=True)
def keeps_a_limit_of_memory(disk, op, offset, buf):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), resource.RLIM_INFINITY))
    right(disk, op, offset, buf)


@case(RIGHT)
def leaves_its_directory(disk, op, offset, buf):
    os.chdir("/proc")
    right(disk, op, offset, buf)


@case(RIGHT)
def changes_its_user(disk, op, offset, buf):
    # The thread's alone; the C library would do so for all of them.
    ctypes.CDLL(None).syscall(105, 65534)
    right(disk, op, offset, buf)


@case(RIGHT)
def blocks_all_signals(disk, op, offset, buf):
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))
    right(disk, op, offset, buf)
