# SPDX-License-Identifier: MIT OR Apache-2.0
"""Whether kublk's fault_inject target really delays requests.

As it comes, it does not (kublk_timeout.h says why); then generic_06 fails and part_02 passes, and neither says
anything about the driver.
"""

import os
import re
import subprocess
import time
from pathlib import Path

# The scripts that rely on the delay.
USERS = ("generic_06", "part_02")

_DELAY = 3.0
_LIMIT = 90.0


def _kublk(program: Path, *arguments: str) -> str:
    done = subprocess.run(
        [program, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LIMIT, check=True
    )
    return done.stdout


def defect(program: Path) -> str:
    """What is wrong with the delay; nothing if it works."""
    try:
        seconds = _measure(program)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return f"kublk's delay cannot be measured: {error}"
    if seconds < _DELAY / 2:
        return f"kublk does not delay: a request that should take {_DELAY:g} s took {seconds:.1f} s"
    return ""


def _measure(program: Path) -> float:
    microseconds = str(int(_DELAY * 1_000_000))
    said = _kublk(program, "add", "-t", "fault_inject", "-q", "1", "-d", "1", "--delay_us", microseconds)
    found = re.search(r"dev id (\d+)", said)
    if not found:
        raise ValueError(f"kublk add says {said!r}")
    number = found[1]
    try:
        begin = time.monotonic()
        subprocess.run(
            ["dd", f"if=/dev/ublkb{number}", f"of={os.devnull}", "iflag=direct", "bs=4k", "count=1", "status=none"],
            stdin=subprocess.DEVNULL,
            timeout=_LIMIT,
            check=True,
        )
        return time.monotonic() - begin
    finally:
        _kublk(program, "del", "-n", number)
