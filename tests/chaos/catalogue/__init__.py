# SPDX-License-Identifier: MIT OR Apache-2.0
"""The catalogue: ways in which a Python handler goes wrong, each with what its client may see.

A case is a function of the disk, the operation, the offset and the buffer, called in place of the right handler for
one block of the disk. What it returns is what the handler returns.
"""

from . import blocking, buffers, devices, exceptions, interpreter, loops, processes, requests, resources, results  # noqa: F401 (each adds its cases)
from .case import CASES, EITHER, ENDS, ERROR, HANDLE, LIVES, MAY_END, OBJECTS, PULL, RIGHT, TASKS, WORKERS, Case
from .planted import PLANTED

__all__ = [
    "CASES",
    "EITHER",
    "ENDS",
    "ERROR",
    "HANDLE",
    "LIVES",
    "MAY_END",
    "OBJECTS",
    "PLANTED",
    "PULL",
    "RIGHT",
    "TASKS",
    "WORKERS",
    "Case",
]
