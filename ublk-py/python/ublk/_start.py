# SPDX-License-Identifier: MIT OR Apache-2.0

"""Starting and recovering devices.

A start may be interrupted between any two of its lines, by an exception that a signal handler raises. What was created
until then is in the list ``made``, and is removed.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import TYPE_CHECKING, Any

from ublk import _driver, _interval, _lifecycle, _signals, _watchdog
from ublk._device import Device
from ublk._numbers import number
from ublk._options import Options
from ublk._running_loop import event_loop, in_thread, to_the_end

if TYPE_CHECKING:
    from ublk import _ublk
    from ublk._block_device import BlockDevice
    from ublk._native import NativeDisk
    from ublk._options import LoopFactory
    from ublk._serving import Native


def start(device: Device) -> None:
    """Create the device and serve it."""
    with _lifecycle.starting(), _driver.taken() as driver:
        _start(device, driver)


def _start(device: Device, driver: _ublk.FakeDriver | None) -> None:
    made: list[Native] = []
    late = device._serving.goes_live_later
    try:
        # First: a signal that kills the program would leave a device that was already created.
        _signals.device_started(device)
        _add(device, driver, made)
        _begin(device)
        if late:
            _register(device)
            # The kernel reads the disk during this, and the caller handles these requests.
            threading.Thread(target=_go_live_later, args=[device], name=f"ublk{device.id}start", daemon=True).start()
            return
        device._native.go_live()
        _register(device)
    except BaseException:
        _undo(device, made)
        raise
    finally:
        if not late:
            device._start_over.set()


async def start_async(device: Device) -> None:
    """Create the device and serve it on the running loop."""
    device._serving.use_running_loop()
    event_loop("start_async")
    with _lifecycle.starting(), _driver.taken() as driver:
        await _start_async(device, driver)


async def _start_async(device: Device, driver: _ublk.FakeDriver | None) -> None:
    made: list[Native] = []
    try:
        _signals.device_started(device)
        await to_the_end(_add, device, driver, made)
        _begin(device)
        await in_thread(device._native.go_live)
        _register(device)
    except BaseException:
        # The loop keeps running meanwhile: requests may have to be served before the device can be removed.
        await to_the_end(_undo, device, made)
        raise
    finally:
        device._start_over.set()


def take_over(device: Device) -> None:
    """Serve the device with the number of the options, which has lost its server."""
    with _lifecycle.starting(), _driver.taken() as driver:
        _take_over(device, driver)


def _take_over(device: Device, driver: _ublk.FakeDriver | None) -> None:
    made: list[Native] = []
    try:
        device._serving.recover(device._shape, device._options, driver, made)
        device._native = made[0]
        device._made()
        _begin(device)
        _register(device)
    except BaseException:
        # Clients of the disk continue to wait.
        for native in made:
            native.abandon()
        device._forget()
        _signals.device_stopped(device)
        raise
    finally:
        device._start_over.set()


def _add(device: Device, driver: _ublk.FakeDriver | None, made: list[Native]) -> None:
    device._serving.add(device._shape, device._options, driver, made)
    device._native = made[0]
    # If the start is interrupted, and so is its undoing, the end of the program does the rest.
    _lifecycle.add(device)
    device._made()


def _begin(device: Device) -> None:
    """Start to take requests, unless another process does."""
    device._serving.begin(device._native)


def _register(device: Device) -> None:
    _lifecycle.add(device)
    if device._serving.needs_python:
        _interval.shorten(device)
    if device._serving.is_watched and device._options.hang_timeout is not None:
        _watchdog.watch(device._native, device.path, device._options.hang_timeout, device._serving)
    _signals.device_started(device)


def _undo(device: Device, made: list[Native]) -> None:
    """Remove everything that a start has created before it failed or was interrupted."""
    if not made:
        device._forget()
        _signals.device_stopped(device)
        return
    device._native = made[0]
    _lifecycle.add(device)
    try:
        device._end(functools.partial(device._native.stop, _lifecycle.STOP_SECONDS))
    finally:
        # A stop in the background waits for this.
        device._start_over.set()


def _go_live_later(device: Device) -> None:
    """Go live while requests are being taken."""
    try:
        device._native.go_live()
    except BaseException as error:
        # Threads that take requests or wait for the device raise it, unless the device was stopped meanwhile.
        if not device._stopped:
            device._exception = error
    finally:
        device._start_over.set()


def run(
    target: BlockDevice | NativeDisk,
    *,
    queues: int = 1,
    depth: int = 128,
    id: int | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> None:
    """Serve a block device until Ctrl-C, SIGTERM or its deletion by another process, then return.

    Prints the device's path when its node is ready, unless ``quiet``. The other parameters are those of
    `BlockDevice.start`. Raises the exception with which a handler ended the device, if any.
    """
    more: dict[str, Any] = {} if workers is None else {"workers": workers}
    with (
        contextlib.suppress(KeyboardInterrupt, _signals.Terminated),
        target.start(queues=queues, depth=depth, id=id, **more) as device,
    ):
        if not quiet:
            print(device.path, flush=True)
        device.wait()


def recover(
    id: int,
    target: BlockDevice | NativeDisk,
    *,
    hang_timeout: float | None = 30.0,
    workers: int | None = None,
    pull: bool = False,
    loop_factory: LoopFactory | None = None,
    isolated: bool = False,
    coalesce_usecs: int = 0,
    accept_replaced: bool = False,
) -> Device:
    """Serve a recoverable device that has lost its server, and return when its disk works again.

    The device was started with ``recoverable``, by any program. It keeps its shape and queues, and the block device has
    to fit them. If its server has just died, this waits until the driver notices. Requests that have waited are served
    then. The other parameters are those of `BlockDevice.start`.

    If the device was created for a `File`, or a `Zoned` in a directory, then that file or directory has to be the
    same, also if another one has taken its name meanwhile. With ``accept_replaced``, another one may replace the
    disk's data: unmount the disk before. It is also needed if the file is not recognized because its file system was
    mounted again, or the block device because it was deactivated or unplugged meanwhile.

    Raises `UblkError` with ``EBUSY`` if the device still has a server, and with ``EINVAL`` if it is not recoverable;
    `ValueError` if the block device does not fit, is a disk in memory, or is stored in another file.
    """
    target._check_recovery()
    options = Options(
        id=number("id", id, 20),
        hang_timeout=hang_timeout,
        workers=workers,
        pull=pull,
        loop_factory=loop_factory,
        isolated=isolated,
        coalesce_usecs=coalesce_usecs,
        accept_replaced=accept_replaced,
    )
    device = Device._make(target, options)
    take_over(device)
    return device
