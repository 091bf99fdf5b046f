# SPDX-License-Identifier: MIT OR Apache-2.0

"""Disks that the engine serves by itself, without Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ublk._serving import NativeServing
from ublk._ublk import NativeTarget

if TYPE_CHECKING:
    import os

    from ublk._device import Device
    from ublk._serving import Report, Serving
    from ublk._ublk import FakeDriver


class NativeDisk:
    """What `Null`, `Mem`, `File` and `Zoned` have in common."""

    # Whether the disk's data ends with this process.
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
        _driver: FakeDriver | None = None,
    ) -> Device:
        """Make the device and serve it; return when its node can be used. As `BlockDevice.start`.

        Raises `ValueError` for a ``recoverable`` disk in memory: its data ends with this process.
        """
        from ublk._device import Device

        if recoverable:
            self._check_recovery()
        device = Device._make(
            self,
            queues,
            depth,
            id,
            recoverable=recoverable,
            hang_after=None,
            shared_memory=shared_memory,
            coalesce_usecs=coalesce_usecs,
        )
        device._start(_driver)
        return device

    def _serve(self, report: Report, *, workers: object, pull: bool, loop_factory: object) -> Serving:
        if workers is not None or pull or loop_factory is not None:
            raise ValueError(f"{type(self).__name__} is served without Python: no workers, no event loop, no requests")
        return NativeServing(self._native, self._native.operations, report)

    def _check_size(self, size: int) -> None:
        room = self._room()
        if room is not None and size > room:
            raise ValueError(f"size = {size}: there are {room} bytes behind {self!r}")

    def _check_recovery(self) -> None:
        """Refuse to have another server after this one, or to be one, if no data outlives a server."""
        if self._in_memory:
            raise ValueError(
                f"{type(self).__name__}: the disk's data is in this process's memory and ends with it, so that"
                " nothing could be recovered; use File, or Zoned with a directory"
            )

    def _room(self) -> int | None:
        """Tell how many bytes there are, if there is a limit."""
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
    """A disk that accepts everything, stores nothing, and reads as whatever was in memory: for measurements."""

    def __init__(self, size: int, *, block_size: int = 512) -> None:
        super().__init__(NativeTarget.null(size, block_size))

    def _room(self) -> None:
        return None


class Mem(NativeDisk):
    """A RAM disk. Its content is the object's: it is there again when the object is started again.

    It cannot be ``recoverable``.
    """

    _in_memory = True

    def __init__(self, size: int, *, block_size: int = 512) -> None:
        super().__init__(NativeTarget.mem(size, block_size))


class File(NativeDisk):
    """A disk in a file or on a block device.

    The file is opened and locked when the object is made (`UblkError` with ``EAGAIN`` or ``EBUSY`` if somebody else has
    it), and closed when the object is gone. ``direct`` is whether to go round the page cache; by default where the
    file system can. ``block_size`` is by default the smallest that the file can serve.
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
        # Of the open file: another one may have its name.
        return self._native.backing_size


class Zoned(NativeDisk):
    """A zoned disk, in memory, or with a file for each zone in ``directory``. Linux 6.6.

    Sizes are bytes, ``zone_size`` a power of two. The first ``conventional`` zones can be written anywhere.
    ``max_open`` and ``max_active`` limit open and active zones; 0 is for no limit. Only a disk in files can be
    ``recoverable``.
    """

    def __init__(
        self,
        size: int,
        *,
        zone_size: int = 64 << 20,
        conventional: int = 0,
        max_open: int = 0,
        max_active: int = 0,
        block_size: int = 4096,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        target = NativeTarget.zoned(size, zone_size, conventional, max_open, max_active, block_size, directory)
        super().__init__(target)
        self._in_memory = directory is None
