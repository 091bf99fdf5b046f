# SPDX-License-Identifier: MIT OR Apache-2.0

"""File syncs that remember failures."""

from __future__ import annotations

import errno
import logging
import threading
import weakref
from typing import TYPE_CHECKING

from ublk import _ublk
from ublk._log import log

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike


class FileSync:
    """Makes the data of files durable for all threads of a disk, and remembers failures.

    The kernel reports a write-back error once per open file, and marks the lost pages clean. If several threads call
    ``os.fdatasync`` for the same descriptor, one of them gets the error; the others, and all later calls, succeed
    although data is lost. ``os.fdatasync`` itself calls again after ``EINTR``. Use one object of this class in all
    methods that sync::

        def __init__(self, path):
            self.file = os.open(path, os.O_RDWR)
            self.file_sync = ublk.FileSync(self.file)

        def flush(self):
            self.file_sync.sync()

    ``files`` are descriptors or objects with a ``fileno()``, synced in this order. The caller closes them. Nothing else
    may sync them through the same open file: not ``os.fsync``, ``os.fdatasync``, ``mmap.flush`` or another object of
    this class. A coroutine calls `sync` through ``asyncio.to_thread``.
    """

    def __init__(self, *files: FileDescriptorLike) -> None:
        if not files:
            raise TypeError("FileSync needs at least one file")
        for file in files:
            if not isinstance(file, int) and not hasattr(file, "fileno"):
                raise TypeError(f"{file!r} is neither a descriptor nor an object with a fileno()")
        self._files = files
        self._changed = threading.Condition()
        self._failed = False
        # Number of the last sync that has begun, and of the last that has ended.
        self._begun = self._ended = 0
        self._waiting = 0
        _all.add(self)

    @property
    def failed(self) -> bool:
        """Whether a sync has failed."""
        return self._failed

    def sync(self) -> None:
        """Make everything durable that was written before this call.

        Raises the `OSError` of ``fdatasync``, which is never repeated. After a failure all calls, on all threads, raise
        one with ``EIO``, because it is unknown which writes were lost. Signals are blocked on this thread meanwhile.
        One sync runs at a time, and the threads that wait for it share the next one.
        """
        began = synced = False
        try:
            with self._changed:
                # Earlier writes are covered by any sync that begins from now on.
                wanted = self._begun + 1
                self._waiting += 1
                try:
                    self._changed.wait_for(lambda: self._failed or self._ended >= wanted or self._ended == self._begun)
                finally:
                    self._waiting -= 1
                self._check()
                if self._ended >= wanted:
                    return
                began = True
                self._begun += 1
            for file in self._files:
                # Not `os.fdatasync`: it repeats a sync that failed with EINTR, and the repetition succeeds.
                _ublk.fdatasync(file)
            synced = True
        except OSError as error:
            if began:
                text = "fdatasync failed: writes may be lost, and every sync of %s fails from now on: %s"
                log(logging.ERROR, text, ", ".join(map(repr, self._files)), error)
            raise
        finally:
            # No calls here, in which a signal handler could raise: a sync that has begun always ends. One that a signal
            # handler interrupted counts as failed, because the fate of its writes is unknown.
            if began:
                self._failed |= not synced and self._ended != self._begun
                self._ended = self._begun
                self._wake()

    def _wake(self) -> None:
        """Wake the threads that wait for a sync, whatever signal handlers raise meanwhile."""
        raised: BaseException | None = None
        while True:
            try:
                with self._changed:
                    self._changed.notify_all()
                break
            except BaseException as error:
                raised = error
        if raised is not None:
            raise raised

    def _check(self) -> None:
        if self._failed:
            raise OSError(errno.EIO, "an earlier fdatasync failed: writes may be lost")

    def __repr__(self) -> str:
        return f"<ublk.FileSync of {', '.join(map(repr, self._files))}{' failed' if self._failed else ''}>"


_all: weakref.WeakSet[FileSync] = weakref.WeakSet()


def in_forked_child() -> None:
    """Replace locks that a thread of the parent may have held, and forget the parent's syncs."""
    for one in list(_all):
        one._changed = threading.Condition()
        one._ended = one._begun
        one._waiting = 0
