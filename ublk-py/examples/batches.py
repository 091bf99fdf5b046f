# SPDX-License-Identifier: MIT OR Apache-2.0

"""Handles all requests of a wake-up at once, in the order of their offsets.

Run it with ``ublk run batches.py:Batches --size 1G``.
"""

import ublk


class Batches(ublk.BlockDevice):
    """RAM disk that handles requests in batches."""

    operations = ("read", "write")

    def __init__(self, size):
        super().__init__(size=size)
        self.data = bytearray(size)

    def handle(self, requests):
        for request in sorted(requests, key=lambda request: request.offset):
            place = slice(request.offset, request.offset + request.length)
            if request.op == "read":
                request.buffer[:] = self.data[place]
            else:
                self.data[place] = request.buffer
            request.complete()


if __name__ == "__main__":
    ublk.run(Batches(1 << 30))
