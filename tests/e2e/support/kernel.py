# SPDX-License-Identifier: MIT OR Apache-2.0
"""The kernel of the machine."""

import os

# Such as (6, 12).
VERSION = tuple(map(int, os.uname().release.split(".")[:2]))

# Linux 6.1 runs the task work that a thread has gathered in reverse order, and so requests arrive.
KEEPS_ORDER = VERSION >= (6, 6)
