# SPDX-License-Identifier: MIT OR Apache-2.0

"""Conversion of integers."""

from __future__ import annotations

import operator
from typing import SupportsIndex


def number(name: str, value: SupportsIndex, bits: int) -> int:
    """Return an `int`, or an object with ``__index__``, as an unsigned integer of at most so many bits.

    Raises `TypeError` for other types and `bool`, `ValueError` for other values.
    """
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not bool")
    try:
        integer = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, not {type(value).__name__}") from None
    if not 0 <= integer < 1 << bits:
        raise ValueError(f"{name} = {integer}: must be from 0 to {(1 << bits) - 1}")
    return integer
