# SPDX-License-Identifier: MIT OR Apache-2.0

"""All requests of a wake-up at once, sorted before they are served: a log that likes its writes in order.

Run it with ``ublk run batches.py:Batches --size 1G``.
"""

import ublk


class Batches(ublk.BlockDevice):
    """A RAM disk that sees what comes together."""

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
