# SPDX-License-Identifier: MIT OR Apache-2.0
"""The kernel of the machine."""

import os

# Such as (6, 12).
VERSION = tuple(map(int, os.uname().release.split(".")[:2]))
