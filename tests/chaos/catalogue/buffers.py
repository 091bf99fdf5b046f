# SPDX-License-Identifier: MIT OR Apache-2.0
"""What handlers do with their buffers."""

import contextlib
import ctypes
import threading
import time

from .case import EITHER, RIGHT, case, right


@case(RIGHT)
def keeps_the_view(disk, op, offset, buf):
    right(disk, op, offset, buf)
    disk.kept.append(buf)


@case(RIGHT)
def keeps_a_slice_and_scribbles_later(disk, op, offset, buf):
    right(disk, op, offset, buf)
    part = buf[:512]

    def scribble():
        time.sleep(0.2)
        with contextlib.suppress(ValueError, TypeError):
            part[:] = b"\xee" * 512

    threading.Thread(target=scribble, daemon=True).start()


@case(RIGHT)
def keeps_a_ctypes_array(disk, op, offset, buf):
    right(disk, op, offset, buf)
    if not buf.readonly:
        disk.kept.append((ctypes.c_char * len(buf)).from_buffer(buf))


@case(RIGHT)
def keeps_a_cast(disk, op, offset, buf):
    right(disk, op, offset, buf)
    disk.kept.append(buf.cast("Q"))


@case(RIGHT)
def keeps_itself_in_a_cycle(disk, op, offset, buf):
    right(disk, op, offset, buf)
    cycle: list = [buf, buf[:8]]
    cycle.append(cycle)


@case(EITHER)
def releases_the_view(disk, op, offset, buf):
    right(disk, op, offset, buf)
    buf.release()


@case(operations=("write",))
def writes_to_a_buffer_that_is_to_be_read(_disk, _op, _offset, buf):
    buf[0] = 1


@case()
def assigns_the_wrong_length(_disk, _op, _offset, buf):
    buf[:] = bytes(len(buf) - 1)


@case()
def indexes_past_the_end(_disk, _op, _offset, buf):
    return buf[len(buf)]


@case(EITHER, operations=("read",))
def fills_nothing(*_):
    return None


@case(EITHER, operations=("read",))
def fills_half(disk, _op, offset, buf):
    disk.right("read", offset, buf[: len(buf) // 2])


@case(RIGHT)
def passes_the_view_to_a_thread_that_reads_late(disk, op, offset, buf):
    right(disk, op, offset, buf)

    def look():
        time.sleep(0.2)
        with contextlib.suppress(ValueError):
            bytes(buf)

    threading.Thread(target=look, daemon=True).start()


@case(RIGHT)
def releases_in_a_thread_meanwhile(disk, op, offset, buf):
    right(disk, op, offset, buf)
    part = buf[8:]
    threading.Thread(target=part.release, daemon=True).start()
