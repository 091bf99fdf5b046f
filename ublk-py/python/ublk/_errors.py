# SPDX-License-Identifier: MIT OR Apache-2.0

"""What the library raises."""


class UblkError(OSError):
    """A device could not be made, started, stopped or seen.

    ``errno`` says which kind of failure it was, the text what was tried, on which device, and the likely
    cause. Values that cannot be (a block size of 1000, say) are a `ValueError` instead.
    """
