# SPDX-License-Identifier: MIT OR Apache-2.0
"""What handlers return."""

import os

import ublk

from .case import ERROR, METHODS, PLAIN, TASKS, WORKERS, case, define


class _Index:
    def __index__(self) -> int:
        raise ValueError("no index")


for _name, _make in {
    "one_byte_less": lambda buf: len(buf) - 1,
    "one_byte_more": lambda buf: len(buf) + 1,
    "zero": lambda _: 0,
    "minus_one": lambda _: -1,
    "a_huge_number": lambda _: 1 << 80,
    "a_negative_huge_number": lambda _: -(1 << 80),
    "a_float": lambda buf: float(len(buf)),
    "a_text": lambda _: "4096",
    "bytes": lambda buf: bytes(len(buf)),
    "the_buffer": lambda buf: buf,
    "a_list": lambda _: [],
    "true": lambda _: True,
    "false": lambda _: False,
    "NotImplemented": lambda _: NotImplemented,
    "an_exception": lambda _: OSError(5, "not raised"),
    "what_has_no_index": lambda _: _Index(),
    "a_function": lambda _: lambda: None,
    "a_generator": lambda _: (x for x in ()),
    "an_extent_of_nothing": lambda buf: ublk.Extent(900, 0, len(buf)),
    "an_extent_that_is_too_short": lambda _: ublk.Extent(_devnull(), 0, 512),
    "an_extent_of_a_directory": lambda buf: ublk.Extent(os.open("/", os.O_RDONLY), 0, len(buf)),
    "an_extent_of_a_pipe": lambda buf: ublk.Extent(os.pipe()[0], 0, len(buf)),
    "an_extent_of_a_closed_file": lambda buf: _extent_of_closed(len(buf)),
    "an_extent_past_the_end": lambda buf: ublk.Extent(_devnull(), 1 << 40, len(buf)),
    "zeros_that_are_too_short": lambda _: ublk.Zeros(512),
}.items():
    define(f"returns_{_name}", lambda _disk, _op, _offset, buf, make=_make: make(buf), ERROR, styles=METHODS)


def _devnull() -> int:
    return os.open("/proc/version", os.O_RDONLY)


def _extent_of_closed(length: int) -> ublk.Extent:
    file = os.open("/proc/version", os.O_RDONLY)
    os.close(file)
    return ublk.Extent(file, 0, length)


@case(styles=(PLAIN, WORKERS))
def returns_a_coroutine_that_is_not_awaited(*_):
    async def never():
        pass

    return never()


@case(styles=(TASKS,))
def returns_a_coroutine_that_returns_one(*_):
    async def inner():
        pass

    async def outer():
        return inner()

    return outer()
