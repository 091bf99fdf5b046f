# SPDX-License-Identifier: MIT OR Apache-2.0

"""The native half of the `ublk` package. Private: use `ublk`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

__all__ = [
    "Buffer",
    "FakeDriver",
    "NativeDevice",
    "__version__",
    "devices",
    "features",
    "main",
    "start",
]

__version__: str

@final
class Buffer:
    """The memory of one tag; lent to handlers as a memoryview."""

@final
class NativeDevice:
    """A running device."""

    @property
    def id(self) -> int: ...
    @property
    def path(self) -> Path: ...
    @property
    def queues(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def max_io_bytes(self) -> int: ...
    @property
    def ending(self) -> bool: ...
    @property
    def stopped(self) -> bool: ...
    def fileno(self) -> int: ...
    def stop(self) -> None: ...

@final
class FakeDriver:
    """A driver in this process, and the client of its disks."""

    def __new__(cls) -> FakeDriver: ...
    def read(self, id: int, offset: int, length: int) -> bytes: ...
    def write(self, id: int, offset: int, data: bytes) -> None: ...
    def flush(self, id: int) -> None: ...
    def discard(self, id: int, offset: int, length: int) -> None: ...
    def write_zeroes(self, id: int, offset: int, length: int) -> None: ...
    def devices(self) -> list[int]: ...
    def violations(self) -> list[str]: ...

def start(
    kind: str,
    shape: Mapping[str, int | bool],
    handlers: Mapping[str, Callable[..., Any] | None],
    queues: int,
    depth: int,
    id: int | None,
    spawn: Callable[[str, Callable[[], None]], None],
    driver: FakeDriver | None,
    made: list[NativeDevice],
) -> None: ...
def features() -> dict[str, bool]: ...
def devices() -> list[dict[str, Any]]: ...
def main(arguments: Sequence[str], relaunch: Sequence[str], extra: Sequence[tuple[str, str]]) -> int: ...
