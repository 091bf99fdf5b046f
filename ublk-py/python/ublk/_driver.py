# SPDX-License-Identifier: MIT OR Apache-2.0

"""The driver that devices are created on: the kernel's, or a stand-in for tests."""

from __future__ import annotations

import contextlib
import contextvars
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ublk._ublk import FakeDriver

_stand_in: contextvars.ContextVar[FakeDriver | None] = contextvars.ContextVar("ublk driver", default=None)


def current() -> FakeDriver | None:
    """Return the stand-in driver of the calling context, or None for the kernel's driver."""
    return _stand_in.get()


@contextlib.contextmanager
def taken() -> Iterator[FakeDriver | None]:
    """Yield the current driver, and hide it inside the block from threads and tasks that inherit the context."""
    driver = _stand_in.get()
    token = _stand_in.set(None)
    try:
        yield driver
    finally:
        _stand_in.reset(token)


@contextlib.contextmanager
def using(driver: FakeDriver) -> Iterator[None]:
    """Create and recover devices on a stand-in driver inside the block, in this thread or task only."""
    token = _stand_in.set(driver)
    try:
        yield
    finally:
        _stand_in.reset(token)
