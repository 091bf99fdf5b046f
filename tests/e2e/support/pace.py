# SPDX-License-Identifier: MIT OR Apache-2.0
"""How fast the machine is. Limits are written for an ordinary kernel; one that checks each of its memory
accesses takes longer for everything."""

import os

# Set by the testbed for the debug kernel.
DEBUG_KERNEL = os.environ.get("UBLK_DEBUG") == "1"

# Emulated machines on a busy host may be ten times slower than others.
_FACTOR = 8.0 if DEBUG_KERNEL else 3.0


def patience(seconds: float) -> float:
    """The limit for something that an ordinary kernel does within `seconds`."""
    return seconds * _FACTOR
