# SPDX-License-Identifier: MIT OR Apache-2.0

"""Integers before they become Rust's."""

from __future__ import annotations


def number(name: str, value: object, bits: int) -> int:
    """Check that a value is an integer of so many bits."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name} = {value}: 0 to {(1 << bits) - 1} are possible")
    return value
