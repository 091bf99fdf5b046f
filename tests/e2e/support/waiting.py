# SPDX-License-Identifier: MIT OR Apache-2.0
"""Waiting for something with an end."""

import time
from collections.abc import Callable
from typing import TypeVar

from .pace import patience

T = TypeVar("T")


def until(condition: Callable[[], T], what: str, seconds: float = 10.0, step: float = 0.02) -> T:
    """Returns the first true value of `condition`; fails with `what` when the time is over."""
    seconds = patience(seconds)
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(f"{what}: not within {seconds:g} s (last value: {value!r})")
        time.sleep(step)
