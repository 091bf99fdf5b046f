# SPDX-License-Identifier: MIT OR Apache-2.0

"""Exceptions of the library."""


class UblkError(OSError):
    """Failure to create, start, stop, query or delete a device.

    ``errno`` is the kind of failure. The message names the operation, the device and the likely cause. Invalid values,
    such as a block size of 1000, raise `ValueError` instead.
    """
