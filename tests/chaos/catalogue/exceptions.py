# SPDX-License-Identifier: MIT OR Apache-2.0
"""Exceptions: each built-in class, errors with numbers that are none, and nasty ones."""

import builtins
import errno
import json
from collections.abc import Callable
from typing import Any

from .case import ENDS, LIVES, MAY_END, case, define

_ARGUMENTS = {
    "UnicodeDecodeError": ("utf-8", b"x", 0, 1, "planted"),
    "UnicodeEncodeError": ("utf-8", "x", 0, 1, "planted"),
    "UnicodeTranslateError": ("x", 0, 1, "planted"),
    "BaseExceptionGroup": ("planted", [KeyboardInterrupt()]),
    "ExceptionGroup": ("planted", [ValueError()]),
}
_STOPS = ("SystemExit", "KeyboardInterrupt")


def raiser(make: Callable[[], BaseException]) -> Callable:
    def act(*_: Any) -> None:
        raise make()

    return act


for _name, _class in sorted(vars(builtins).items()):
    if isinstance(_class, type) and issubclass(_class, BaseException) and _class.__name__ == _name:
        _arguments = _ARGUMENTS.get(_name, ("planted",))
        define(
            f"raises_{_name}",
            raiser(lambda kind=_class, arguments=_arguments: kind(*arguments)),
            server=ENDS if _name in _STOPS else MAY_END if not issubclass(_class, Exception) else LIVES,
        )

for _number in (0, -5, 41, 58, 134, 511, 512, 523, 524, 530, 600, 4095, 4096, 1 << 31, 1 << 40, None, "text", 1.5):
    define(f"raises_OSError_{_number}", raiser(lambda number=_number: OSError(number, "planted")))


class _Nasty(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")

    __repr__ = __str__


class _NastyAttributes(OSError):
    @property
    def errno(self) -> int:
        raise ValueError("no number")


@case()
def raises_what_has_no_text(*_):
    raise _Nasty


@case()
def raises_what_has_no_errno(*_):
    raise _NastyAttributes(5, "planted")


@case()
def raises_a_chain_that_is_a_circle(*_):
    first, second = ValueError("first"), ValueError("second")
    first.__context__, second.__context__ = second, first
    raise first


@case()
def raises_an_exception_with_a_megabyte_of_text(*_):
    raise ValueError("x" * (1 << 20))


@case()
def raises_the_class_of_an_error_instead_of_one(*_):
    raise OSError


@case()
def raises_in_a_finally(*_):
    try:
        raise ValueError("first")
    finally:
        raise OSError(errno.ENOSPC, "second")


@case()
def raises_what_is_no_exception(*_):
    raise 5  # type: ignore[misc]  # noqa: B016


@case()
def recurses_without_end(disk, *rest):
    recurses_without_end(disk, *rest)


@case()
def recurses_in_c(*_):
    value: list = []
    for _ in range(100_000):
        value = [value]
    json.dumps(value)
