# SPDX-License-Identifier: MIT OR Apache-2.0

"""Exceptions of the library."""


class UblkError(OSError):
    """Creating, starting, stopping or examining a device failed.

    ``errno`` says which kind of failure it was, the text what was tried, on which device, and the likely
    cause. Values that cannot be (a block size of 1000, say) are a `ValueError` instead.
    """
