# SPDX-License-Identifier: MIT OR Apache-2.0

"""Replacement of the code of a running disk: `ublk run --reload`."""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ublk import _signals
from ublk._errors import UblkError
from ublk._log import log
from ublk._start import recover

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from ublk._block_device import BlockDevice
    from ublk._device import Device

    # Modification time, size and inode of a file.
    Stamp = tuple[int, int, int]


POLL_SECONDS = 0.3


class Source:
    """Source files of a class: its module and all imported modules in the same directory or below."""

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self._root = Path(file).resolve().parent
        # Cached bytecode is checked by a time in seconds, and would hide edits within a second.
        sys.dont_write_bytecode = True
        self._seen = self._stamps()
        self._changing = self._seen

    def modules(self) -> dict[str, ModuleType]:
        """Return the imported modules, by name."""
        found = {}
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if name != "__main__" and name.partition(".")[0] != "ublk" and file and self._is_ours(Path(file)):
                found[name] = module
        return found

    def _is_ours(self, file: Path) -> bool:
        with contextlib.suppress(ValueError, OSError):
            below = file.resolve().relative_to(self._root)
            return "site-packages" not in below.parts
        return False

    def _stamps(self) -> dict[str, Stamp | None]:
        stamps: dict[str, Stamp | None] = {}
        for module in self.modules().values():
            file = str(module.__file__)
            try:
                stat = os.stat(file)
                stamps[file] = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            except OSError:
                # An editor is about to replace it.
                stamps[file] = None
        return stamps

    def has_changed(self) -> bool:
        """Return whether a file has changed since this last returned True, and none since the last call."""
        stamps = self._stamps()
        settled = stamps == self._changing and None not in stamps.values()
        self._changing = stamps
        if not settled or stamps == self._seen:
            return False
        self._seen = stamps
        return True

    @contextlib.contextmanager
    def forgotten(self) -> Iterator[None]:
        """Forget the modules in the block, so that they are imported again. Restores them if the block raises."""
        modules = self.modules()
        for name in modules:
            del sys.modules[name]
        importlib.invalidate_caches()
        try:
            yield
        except BaseException:
            for name in self.modules():
                del sys.modules[name]
            sys.modules.update(modules)
            raise
        finally:
            # The new code may import other modules, which are watched as well.
            self._seen = self._changing = self._stamps()


def pass_on(old: BlockDevice, new: BlockDevice) -> None:
    """Transfer the state of one object to the next: with ``take_over`` if its class has it, else like pickling."""
    take_over = getattr(new, "take_over", None)
    if take_over is not None:
        take_over(old)
        return
    state = old.__getstate__()
    set_state = getattr(new, "__setstate__", None)
    if set_state is not None:
        set_state(state)
        return
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    # Attributes that only the new class has keep the values that its constructor has set.
    for part in (attributes, slots):
        for name, value in (part or {}).items():
            if name != "_kept_extents":
                setattr(new, name, value)


class Reloader:
    """Device whose block device is replaced when its source changes."""

    def __init__(
        self,
        target: BlockDevice,
        make: Callable[[], BlockDevice],
        source: Source,
        *,
        workers: int | None = None,
        coalesce_usecs: int = 0,
    ) -> None:
        self._target = target
        self._make = make
        self._source = source
        self._how: dict[str, Any] = {"workers": workers, "coalesce_usecs": coalesce_usecs}
        # The next block device, while a handler of the old one is still running.
        self._next: BlockDevice | None = None
        self._counted = False
        self.device: Device

    def start(self, *, queues: int = 1, depth: int = 128, id: int | None = None) -> Device:
        """Serve the disk with the first object."""
        self.device = self._target.start(queues=queues, depth=depth, id=id, recoverable=True, **self._how)
        if not self.device.can_quiesce:
            self.device.stop()
            text = "--reload needs UBLK_F_QUIESCE: Linux 6.16 or newer, or the driver of this project"
            raise UblkError(errno.EOPNOTSUPP, text)
        # The device also exists between two servers, and SIGTERM must remove it then.
        _signals.device_started(self)
        self._counted = True
        return self.device

    def close(self) -> None:
        """Stop the device."""
        try:
            self.device.stop()
        finally:
            if self._counted:
                self._counted = False
                _signals.device_stopped(self)

    def wait(self, seconds: float) -> bool:
        """Wait up to so many seconds for the device to end; return whether it did."""
        if self._next is None:
            return self.device.wait(seconds)
        # It has ended already, and waits for the next block device.
        time.sleep(seconds)
        return False

    def look(self) -> bool:
        """Serve the disk with the new code if the source has changed and works; return whether it does.

        Raises the error if the disk has no server after that.
        """
        if self._next is None:
            if not self.device.running or not self._source.has_changed():
                return False
        elif self.device._native.queues_left:
            return False
        try:
            with self._source.forgotten() if self._next is None else contextlib.nullcontext():
                self._replace(self._next or self._make())
        except _signals.Terminated:
            raise
        except (Exception, SystemExit) as error:
            cause = error.__cause__ or error
            if self._next is not None:
                log(logging.ERROR, "a handler of the old code hangs; the new code serves once it returns: %s", error)
            elif self.device.running:
                log(
                    logging.ERROR, "the new code does not work; the old code continues to serve: %s", error, error=cause
                )
            else:
                raise
            return False
        log(logging.WARNING, "%s is now served by the new code", self.device.path)
        return True

    def _replace(self, new: BlockDevice) -> None:
        old, id = self._target, self.device.id
        self._next = None
        is_left = False
        try:
            # Signals are deferred during each step of the hand-over, but not while code of the class runs.
            with _signals.deferred():
                self._quiesce(new)
                is_left = True
            # Requests wait from here on.
            pass_on(old, new)
            new._follow(old)
            with _signals.deferred():
                self.device = self._recover(id, new)
                self._target = new
        except BaseException:
            if is_left and self._target is old:
                with _signals.deferred():
                    self.device = self._recover(id, old)
            raise

    def _quiesce(self, new: BlockDevice) -> None:
        try:
            self.device.quiesce()
        except UblkError:
            # The driver passes no more requests to the old code, but a handler may still be running.
            if self.device._native.queues_left and not self.device.running:
                self._next = new
            raise
        except BaseException:
            # The second signal: no new code is started.
            log(logging.WARNING, "%s waits for another server: ublk.recover(%d, ...)", self.device.path, self.device.id)
            raise

    def _recover(self, id: int, target: BlockDevice) -> Device:
        return recover(id, target, **self._how)
