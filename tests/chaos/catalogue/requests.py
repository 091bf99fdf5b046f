# SPDX-License-Identifier: MIT OR Apache-2.0
"""Handlers that misuse request objects; the buffer of a case is the request here."""

import contextlib
import errno
import threading
import time
from collections.abc import Callable
from typing import Any

from .case import EITHER, ERROR, LIVES, MAY_END, OBJECTS, RIGHT, case, define, right


def on_request(client: str = ERROR, server: str = LIVES, **more: Any) -> Callable[[Callable], Callable]:
    return case(client, server, styles=OBJECTS, **more)


@on_request(RIGHT)
def completes_twice(disk, op, offset, request):
    right(disk, op, offset, request.buffer)
    request.complete()
    with contextlib.suppress(Exception):
        request.complete()


@on_request(RIGHT)
def fails_after_completion(disk, op, offset, request):
    right(disk, op, offset, request.buffer)
    request.complete()
    with contextlib.suppress(Exception):
        request.fail(5)


@on_request(EITHER)
def drops_the_request(_disk, _op, _offset, request):
    del request


@on_request(RIGHT)
def completes_in_a_thread_later(disk, op, offset, request):
    def later():
        time.sleep(0.3)
        disk.right(op, offset, request.buffer)
        request.complete()

    threading.Thread(target=later, daemon=True).start()


@on_request(EITHER)
def completes_in_a_destructor(disk, op, offset, request):
    class Late:
        def __del__(self):
            disk.right(op, offset, request.buffer)
            request.complete()

    Late()


@on_request(RIGHT)
def scribbles_after_completion(disk, op, offset, request):
    buffer = request.buffer
    right(disk, op, offset, buffer)
    request.complete()
    with contextlib.suppress(Exception):
        buffer[:] = b"\xee" * len(buffer)


for _number in (0, -5, 41, 134, 524, 600, 4095, 4096, 1 << 40):

    def _fail(_disk, _op, _offset, request, number=_number):
        try:
            request.fail(number)
        except Exception:
            request.fail(errno.EIO)

    define(f"fails_with_{_number}", _fail, styles=OBJECTS)


@on_request()
def fails_with_nothing(_disk, _op, _offset, request):
    try:
        request.fail(None)
    except Exception:
        request.fail(errno.EIO)


@on_request(EITHER, MAY_END, blocks=True)
def keeps_the_request_for_ever(disk, _op, _offset, request):
    disk.kept.append(request)
