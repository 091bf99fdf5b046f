# SPDX-License-Identifier: MIT OR Apache-2.0

"""The native half of the `ublk` package. Private: use `ublk`."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, final
from weakref import ref

from _typeshed import FileDescriptorLike

from ublk._options import Options
from ublk._requests import Op
from ublk._serving import Serving

__all__ = [
    "Buffer",
    "Extent",
    "Extents",
    "FakeDriver",
    "NativeDevice",
    "NativeTarget",
    "PullQueue",
    "Request",
    "Worker",
    "Zeros",
    "__version__",
    "add",
    "after_fork",
    "call_in_main_thread",
    "check",
    "close_gate",
    "delete",
    "device",
    "devices",
    "exit_forked_child",
    "exit_within",
    "fdatasync",
    "features",
    "main",
    "quiesce",
    "recover",
    "resize",
    "run_fork_hook",
]

__version__: str

@final
class Buffer:
    """Memory of one tag, which handlers see as a memoryview."""

@final
class Request:
    """Request of the block layer, to be completed or failed once, at any time and from any thread.

    A request that is dropped without an answer fails with ``EIO``, and the log shows where. As a context manager it is
    completed at the end of the block, or fails with the errno of the block's exception.
    """

    @property
    def op(self) -> Op:
        """Operation of the request."""

    @property
    def offset(self) -> int:
        """First byte on the disk; 0 for a flush."""

    @property
    def length(self) -> int:
        """Length in bytes; 0 for a flush."""

    @property
    def fua(self) -> bool:
        """Whether the write must be durable before it is acknowledged (FUA).

        Linux sends FUA writes only to disks that advertise them; others get a flush after the write.
        """

    @property
    def no_unmap(self) -> bool:
        """Whether zeroed blocks must stay allocated."""

    @property
    def queue(self) -> int:
        """Number of the hardware queue that delivered the request."""

    @property
    def done(self) -> bool:
        """Whether the request has been completed or failed."""

    @property
    def buffer(self) -> memoryview:
        """The request's own memory, with the data of a write (read-only) or for the data of a read.

        Valid until the request ends; raises `ValueError` afterwards. Empty for requests without data.
        """

    def complete(self) -> None:
        """Complete the request in full. Raises `ValueError` if it has ended already."""

    def fail(self, errno: int = 5) -> None:
        """Fail the request with an errno. Raises `ValueError` if it has ended already."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None, /
    ) -> bool: ...
    def _call(self, methods: tuple[Callable[..., Any] | None, ...]) -> Any: ...
    def _finish(self, returned: object) -> bool: ...
    def _raise(self, exception: BaseException) -> bool: ...

@final
class Extent:
    """Location of a range of a disk: ``length`` bytes of a file, starting at ``offset``.

    The range starts at the offset of the disk that `BlockDevice.map` was called for, or at ``start``, which may be
    lower. It may be longer or shorter than the request.

    ``file`` is a descriptor or an object with a ``fileno()``: a regular file or a block device, opened for the required
    access. The program may close it afterwards. A ``stable`` extent is cached until `BlockDevice.invalidate` withdraws
    it: `BlockDevice.map` is not called for requests of the same operation inside it.

    Only one disk may write to an open file, and only its `BlockDevice.flush` may sync it: the kernel reports lost
    writes once per open file, and the flushes of a disk succeed if something else has received the error. Disks that
    share a file must each open it.

    An extent duplicates the descriptor. Closing any descriptor of a file drops the process's POSIX locks on the file
    (``fcntl.lockf``), so take such a lock before making the first extent in the file: the duplicate then stays open
    until the program unlocks or closes the file. Locks of ``fcntl.flock`` are not affected.
    """

    def __new__(
        cls, file: FileDescriptorLike, offset: int, length: int, *, start: int | None = None, stable: bool = False
    ) -> Extent: ...
    @property
    def offset(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def start(self) -> int | None: ...
    @property
    def stable(self) -> bool: ...

@final
class Zeros:
    """Range of a disk that reads as zeros; see `Extent` for the parameters."""

    def __new__(cls, length: int, *, start: int | None = None, stable: bool = False) -> Zeros: ...
    @property
    def length(self) -> int: ...
    @property
    def start(self) -> int | None: ...
    @property
    def stable(self) -> bool: ...

@final
class Extents:
    """The extents of a block device that are kept."""

    def __new__(cls) -> Extents: ...
    def successor(self) -> Extents: ...
    def invalidate(self, offset: int, length: int, wait: float | None) -> bool: ...
    def __reduce__(self) -> tuple[type[Extents], tuple[()]]: ...
    def __len__(self) -> int: ...

@final
class NativeTarget:
    """A target of the engine's own."""

    @staticmethod
    def null(size: int, block_size: int) -> NativeTarget: ...
    @staticmethod
    def mem(size: int, block_size: int) -> NativeTarget: ...
    @staticmethod
    def file(
        path: str | PathLike[str], read_only: bool, block_size: int | None, direct: bool | None
    ) -> NativeTarget: ...
    @staticmethod
    def zoned(
        size: int,
        zone_size: int,
        conventional_zones: int,
        max_open_zones: int,
        max_active_zones: int,
        block_size: int,
        directory: str | PathLike[str] | None,
    ) -> NativeTarget: ...
    @property
    def kind(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def backing_size(self) -> int | None: ...
    @property
    def block_size(self) -> int: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def operations(self) -> list[str]: ...

@final
class PullQueue:
    """Requests of one hardware queue, to be taken."""

    def take(self, max: int, hand: list[ref[Request]]) -> list[Request] | None: ...
    def take_into(self, max: int, requests: list[Request]) -> bool: ...
    def corked(self, call: Callable[[], None], /) -> None: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...

@final
class Worker:
    """For a thread that serves requests of a queue, one at a time."""

    def __new__(cls, queue: PullQueue, methods: Mapping[str, Callable[..., Any] | None]) -> Worker: ...
    def run(self) -> None: ...

@final
class NativeDevice:
    """A device of this process."""

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
    @property
    def pull_queues(self) -> list[PullQueue]: ...
    def fileno(self) -> int: ...
    @property
    def recovery(self) -> str | None: ...
    @property
    def can_quiesce(self) -> bool: ...
    @property
    def queues_left(self) -> int: ...
    @property
    def data_movement(self) -> str: ...
    @property
    def entries(self) -> int: ...
    def busy(self) -> list[tuple[int, int, float]]: ...
    def go_live(self) -> None: ...
    def stop(self, seconds: float) -> None: ...
    def hand_over(self) -> None: ...
    def leave(self) -> None: ...
    @property
    def revoked(self) -> int: ...
    @property
    def hurried(self) -> bool: ...
    @property
    def on_kernel(self) -> bool: ...
    def expedite(self) -> None: ...
    @property
    def served_here(self) -> bool: ...
    @property
    def in_handler(self) -> bool: ...
    def abandon(self) -> None: ...
    def resize(self, size: int) -> None: ...
    def share_memory(self, file: FileDescriptorLike, read_only: bool) -> int: ...
    def unshare_memory(self, number: int) -> None: ...
    def stats(self) -> list[dict[str, Any]]: ...

@final
class FakeDriver:
    """A driver in this process, and the client of its disks."""

    def __new__(cls) -> FakeDriver: ...
    def read(self, id: int, offset: int, length: int) -> bytes: ...
    def write(self, id: int, offset: int, data: bytes) -> None: ...
    def load(self, id: int, rounds: int, depth: int) -> None: ...
    def flush(self, id: int) -> None: ...
    def discard(self, id: int, offset: int, length: int) -> None: ...
    def write_zeroes(self, id: int, offset: int, length: int) -> None: ...
    def devices(self) -> list[int]: ...
    def violations(self) -> list[str]: ...

def add(
    shape: Mapping[str, Any],
    serving: Serving,
    options: Options,
    spawn: Callable[[str, Callable[[], None]], None],
    driver: FakeDriver | None,
    made: list[Any],
) -> None: ...
def recover(
    shape: Mapping[str, Any],
    serving: Serving,
    options: Options,
    spawn: Callable[[str, Callable[[], None]], None],
    driver: FakeDriver | None,
    made: list[Any],
) -> None: ...
def after_fork() -> None: ...
def call_in_main_thread(function: Callable[[], object]) -> None: ...
def check(shape: Mapping[str, Any]) -> None: ...
def close_gate(seconds: float) -> None: ...
def exit_forked_child(way: str) -> NoReturn: ...
def exit_within(seconds: float) -> None: ...
def fdatasync(file: FileDescriptorLike) -> None: ...
def features() -> dict[str, bool]: ...
def devices() -> list[dict[str, Any]]: ...
def device(id: int) -> dict[str, Any]: ...
def delete(id: int, force: bool) -> None: ...
def quiesce(id: int) -> None: ...
def resize(id: int, size: int) -> None: ...
def run_fork_hook(hook: Callable[[], None]) -> None: ...
def main(
    arguments: Sequence[str],
    relaunch: Sequence[str],
    extra: Sequence[Mapping[str, object]],
    bench: Sequence[tuple[str, Sequence[str]]],
) -> int: ...
