# SPDX-License-Identifier: MIT OR Apache-2.0
"""The kernel's log between two moments."""

import errno
import os
import re
from collections.abc import Sequence

# What the block layer says about requests that fail, about reads ahead and write-back of them, and
# about partition tables that cannot be read.
_FAILED_REQUEST = re.compile(
    r"error, dev ublkb\d+"
    r"|Buffer I/O error on dev(ice)? ublkb\d+"
    r"|Dev ublkb\d+: unable to read RDB block"
    r"|ublkb\d+: unable to read partition table"
    r"|ldm_validate_partition_table\(\): Disk read failed"
    r"|lost (async|sync) page write"
)

# Trouble whatever the level it is logged at.
_TROUBLE = re.compile(
    r"WARNING:|BUG:|BUG |Oops|INFO: task|blocked for more than|general protection|Call Trace"
    r"|cut here|lockup|refcount_t|UBSAN|KASAN|I/O error|possible circular|use-after-free"
    r"|possible recursive|inconsistent lock state|suspicious RCU|register non-static key|held lock freed"
    r"|still (has locks )?held|sleeping function|ODEBUG|new suspected memory leaks"
)

_ERROR_LEVEL = 3


class KernelLog:
    """A place in /dev/kmsg: what is read is what was logged since it was opened."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._fd, 0, os.SEEK_END)
        self.lines: list[tuple[int, str]] = []

    def close(self) -> None:
        os.close(self._fd)

    def note(self, text: str) -> None:
        """Writes a line of ours, so that who reads the whole log finds the tests in it."""
        os.write(self._fd, f"<15>e2e: {text}\n".encode())

    def read(self) -> list[tuple[int, str]]:
        """All lines so far, as (level, text)."""
        while True:
            try:
                record = os.read(self._fd, 16384).decode(errors="replace")
            except BlockingIOError:
                return self.lines
            except OSError as error:
                if error.errno != errno.EPIPE:
                    raise
                self.lines.append((_ERROR_LEVEL, "(the log was overwritten before it was read)"))
                continue
            prefix, _, text = record.partition(";")
            priority = int(prefix.split(",")[0])
            # Other facilities are user space's.
            if priority >> 3 == 0:
                self.lines.append((priority & 7, text.split("\n")[0]))

    def trouble(self, io_errors: Sequence[str] | None) -> list[str]:
        """Lines that a clean run does not have. With `io_errors`, requests may fail, and who works with
        them may say so in lines that match one of these expressions."""
        expected = [] if io_errors is None else [_FAILED_REQUEST, *map(re.compile, io_errors)]
        return [
            text
            for level, text in self.read()
            if (level <= _ERROR_LEVEL or _TROUBLE.search(text)) and not any(line.search(text) for line in expected)
        ]
