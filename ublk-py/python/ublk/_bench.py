# SPDX-License-Identifier: MIT OR Apache-2.0

"""The disk written in Python that ``ublk bench`` measures."""

from __future__ import annotations

from ublk._block_device import BlockDevice


class Null(BlockDevice):
    """A disk of 256 GiB whose methods do nothing."""

    def __init__(self) -> None:
        super().__init__(size=256 << 30)

    def read(self, offset: int, buf: memoryview) -> None:
        """Leave the buffer as it is."""

    def write(self, offset: int, buf: memoryview) -> None:
        """Drop the data."""
