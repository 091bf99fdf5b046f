# SPDX-License-Identifier: MIT OR Apache-2.0
"""Planted faults of the server, for the test of the judge: not part of a campaign."""

import os

from .case import EITHER, ERROR, LIVES, PLAIN, RIGHT, Case


def answers_with_wrong_bytes(_disk, _op, _offset, buf):
    if not buf.readonly:
        buf[:] = b"\x77" * len(buf)


def answers_with_bytes_of_another_block(disk, _op, offset, buf):
    if not buf.readonly:
        disk.right("read", offset - len(buf), buf)


PLANTED = {
    "wrong-bytes": Case(
        "answers_with_wrong_bytes", answers_with_wrong_bytes, RIGHT, styles=(PLAIN,), operations=("read",)
    ),
    "other-block": Case(
        "answers_with_bytes_of_another_block",
        answers_with_bytes_of_another_block,
        EITHER,
        styles=(PLAIN,),
        operations=("read",),
    ),
    "acknowledged-failure": Case("returns_nothing", lambda *_: None, ERROR, styles=(PLAIN,), operations=("write",)),
    "dies": Case("exits_at_once", lambda *_: os._exit(3), EITHER, LIVES, styles=(PLAIN,), operations=("read",)),
}
