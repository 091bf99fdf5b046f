# SPDX-License-Identifier: MIT OR Apache-2.0

"""Integers before they become Rust's."""

from __future__ import annotations

import operator
from typing import SupportsIndex


def number(name: str, value: SupportsIndex, bits: int) -> int:
    """Return a value as an `int`, if it is an integer of so many bits: an `int`, or what has ``__index__``."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not bool")
    try:
        integer = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, not {type(value).__name__}") from None
    if not 0 <= integer < 1 << bits:
        raise ValueError(f"{name} = {integer}: must be from 0 to {(1 << bits) - 1}")
    return integer
