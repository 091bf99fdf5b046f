# SPDX-License-Identifier: MIT OR Apache-2.0

"""Program that takes requests in its own loop."""

import contextlib

import ublk

SIZE = 64 << 20
data = bytearray(SIZE)

with contextlib.suppress(KeyboardInterrupt), ublk.BlockDevice(size=SIZE).start(pull=True) as dev:
    print(dev.path)
    for request in dev.requests():
        # The request is completed at the end of the block, or failed by an exception.
        with request:
            place = slice(request.offset, request.offset + request.length)
            if request.op == "read":
                request.buffer[:] = data[place]
            else:
                data[place] = request.buffer
