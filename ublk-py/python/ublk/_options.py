# SPDX-License-Identifier: MIT OR Apache-2.0

"""The options that a device is started with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypedDict

from ublk._numbers import number

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

LoopFactory: TypeAlias = "Callable[[], asyncio.AbstractEventLoop]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Checked options of `BlockDevice.start` or `recover`, where they are documented.

    Raises `ValueError` or `TypeError` for values that no device can have. What depends on the block device is checked
    by its way of serving requests, and what depends on the driver by the engine.
    """

    queues: int = 1
    depth: int = 128
    id: int | None = None
    recoverable: bool | str = False
    hang_timeout: float | None = 30.0
    workers: int | None = None
    pull: bool = False
    loop_factory: LoopFactory | None = None
    isolated: bool = False
    shared_memory: bool = False
    coalesce_usecs: int = 0
    accept_replaced: bool = False

    def __post_init__(self) -> None:
        if self.workers is not None:
            self._set("workers", number("workers", self.workers, 16))
            if self.workers == 0:
                raise ValueError("workers = 0: must be at least 1")
        if self.hang_timeout is not None and not self.hang_timeout > 0:
            raise ValueError(f"hang_timeout = {self.hang_timeout}: must be more than 0 seconds, or None")
        if self.hang_timeout == math.inf:
            # Never, like None, which keeps the watchdog from looking at the device at all.
            self._set("hang_timeout", None)
        self._set("coalesce_usecs", number("coalesce_usecs", self.coalesce_usecs, 32))
        if self.isolated and self.shared_memory:
            raise ValueError("isolated=True cannot be combined with shared_memory=True")
        self._set("queues", number("queues", self.queues, 32))
        self._set("depth", number("depth", self.depth, 32))
        if self.id is not None:
            self._set("id", number("id", self.id, 20))
        self._set("shared_memory", bool(self.shared_memory))
        self._set("accept_replaced", bool(self.accept_replaced))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def recovery(self) -> str | None:
        """Name of the recovery mode; None if the device is removed with its server."""
        if isinstance(self.recoverable, bool):
            return "reissue" if self.recoverable else None
        return self.recoverable


class StartOptions(TypedDict, total=False):
    """Keyword arguments of `BlockDevice.start`, for functions that pass them on."""

    queues: int
    depth: int
    id: int | None
    recoverable: bool | str
    hang_timeout: float | None
    workers: int | None
    pull: bool
    loop_factory: LoopFactory | None
    isolated: bool
    shared_memory: bool
    coalesce_usecs: int
