# SPDX-License-Identifier: MIT OR Apache-2.0

"""Native disks, which the engine serves without Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ublk import _start
from ublk._device import Device
from ublk._options import Options
from ublk._serving import NativeServing
from ublk._ublk import NativeTarget

if TYPE_CHECKING:
    import os

    from ublk._serving import Hooks, Serving


class NativeDisk:
    """Base class of `Null`, `Mem`, `File` and `Zoned`."""

    # Whether the disk's data is in this process's memory.
    _in_memory = False

    def __init__(self, target: NativeTarget) -> None:
        self._native = target
        self.size: int = target.size
        self._made_for = target.size

    @property
    def block_size(self) -> int:
        """Logical block size in bytes."""
        return self._native.block_size

    @property
    def read_only(self) -> bool:
        """Whether the disk refuses writes."""
        return self._native.read_only

    def start(
        self,
        *,
        queues: int = 1,
        depth: int = 128,
        id: int | None = None,
        recoverable: bool | str = False,
        shared_memory: bool = False,
        coalesce_usecs: int = 0,
    ) -> Device:
        """Create the device, serve it, and return when its node is ready; see `BlockDevice.start`.

        Raises `ValueError` for a ``recoverable`` disk in memory, whose data is lost with this process.
        """
        if recoverable:
            self._check_recovery()
        options = Options(
            queues=queues,
            depth=depth,
            id=id,
            recoverable=recoverable,
            hang_timeout=None,
            shared_memory=shared_memory,
            coalesce_usecs=coalesce_usecs,
        )
        device = Device._make(self, options)
        _start.start(device)
        return device

    def _serve(self, hooks: Hooks, options: Options) -> Serving:
        name = type(self).__name__
        if options.workers is not None or options.pull or options.loop_factory is not None:
            raise ValueError(f"{name} is a native disk: it cannot be combined with workers, an event loop or pull=True")
        return NativeServing(name, self._native, self._native.operations, hooks)

    def _check_size(self, size: int) -> None:
        room = self._room()
        if room is not None and size > room:
            raise ValueError(f"size = {size}: exceeds the backing store of {self!r} ({room} bytes)")

    def _check_recovery(self) -> None:
        """Refuse recovery if the data is lost with this process."""
        if self._in_memory:
            raise ValueError(
                f"{type(self).__name__}: the disk's data is in this process's memory and is lost with it;"
                " use File, or Zoned with a directory"
            )

    def _room(self) -> int | None:
        """Return the size of the backing store, or None if there is no limit."""
        return self._made_for

    def _describe(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "block_size": self.block_size,
            "physical_block_size": self.block_size,
            "max_io_bytes": 0,
            "discard_granularity": 0,
            "rotational": False,
            "read_only": self.read_only,
            "zone_size": 0,
            "max_open_zones": 0,
            "max_active_zones": 0,
            "max_append_bytes": 0,
        }

    def __repr__(self) -> str:
        return f"<ublk.{type(self).__name__} of {self.size} bytes>"


class Null(NativeDisk):
    """Disk that accepts every request and stores nothing, for measurements. Reads return undefined data."""

    def __init__(self, size: int, *, block_size: int = 512) -> None:
        super().__init__(NativeTarget.null(size, block_size))

    def _room(self) -> None:
        return None


class Mem(NativeDisk):
    """RAM disk. The object owns the content, which is still there when it is started again.

    It cannot be ``recoverable``.
    """

    _in_memory = True

    def __init__(self, size: int, *, block_size: int = 512) -> None:
        super().__init__(NativeTarget.mem(size, block_size))


class File(NativeDisk):
    """Disk stored in a file or on a block device.

    The file is opened and locked when the object is created (`UblkError` with ``EAGAIN`` or ``EBUSY`` if it is in use),
    and closed when the object is destroyed. ``direct`` selects ``O_DIRECT``; by default it is used if the file system
    supports it. ``block_size`` is by default the smallest that the file supports.

    The lock is that of ``flock``. Closing the file drops the process's POSIX locks on it (``fcntl.lockf``), if there
    are any.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        block_size: int | None = None,
        direct: bool | None = None,
    ) -> None:
        super().__init__(NativeTarget.file(path, read_only, block_size, direct))

    def _room(self) -> int | None:
        # The open file's size: the path may name another file by now.
        return self._native.backing_size


class Zoned(NativeDisk):
    """Zoned disk, in memory or with one file per zone in ``directory``. Linux 6.6.

    Sizes are in bytes; ``zone_size`` is a power of two. The first ``conventional_zones`` zones can be written anywhere.
    ``max_open_zones`` and ``max_active_zones`` limit the number of open and active zones; 0 means no limit. Only a disk
    in a directory can be ``recoverable``.
    """

    def __init__(
        self,
        size: int,
        *,
        zone_size: int = 64 << 20,
        conventional_zones: int = 0,
        max_open_zones: int = 0,
        max_active_zones: int = 0,
        block_size: int = 4096,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        limits = (conventional_zones, max_open_zones, max_active_zones)
        super().__init__(NativeTarget.zoned(size, zone_size, *limits, block_size, directory))
        self._in_memory = directory is None
