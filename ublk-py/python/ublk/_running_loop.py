# SPDX-License-Identifier: MIT OR Apache-2.0

"""The event loop of the caller, and blocking calls from its tasks."""

from __future__ import annotations

import contextlib
import contextvars
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


def event_loop(caller: str) -> asyncio.AbstractEventLoop:
    """Return the running event loop of asyncio. Raises `RuntimeError` if there is none."""
    # Not with the module: this takes most of the time of an import, and most programs do not need it.
    import asyncio

    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        text = f"{caller} needs a running event loop of asyncio"
        trio = sys.modules.get("trio")
        if trio is not None and trio.lowlevel.in_trio_run():
            text += ", but this is trio: call start() and stop() with trio.to_thread.run_sync"
        raise RuntimeError(text) from None


def in_thread(function: Callable[..., None], *arguments: object) -> asyncio.Future[None]:
    """Call a function in a new thread.

    The threads of the loop's executor may all be in calls of handlers that the function waits for.
    """
    import asyncio

    loop = asyncio.get_running_loop()
    over = loop.create_future()

    def settle(error: BaseException | None) -> None:
        # The future may have been cancelled.
        if over.done():
            return
        if error is None:
            over.set_result(None)
        else:
            over.set_exception(error)

    def call() -> None:
        error: BaseException | None = None
        try:
            function(*arguments)
        except BaseException as raised:
            error = raised
        # The loop may have been closed.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, error)

    # A daemon: the interpreter joins other threads before it runs the exit handlers, which end such waits.
    run = contextvars.copy_context().run
    threading.Thread(target=run, args=(call,), name="ublk-call", daemon=True).start()
    return over


async def to_the_end(function: Callable[..., None], *arguments: object) -> None:
    """Call a function in a new thread, and wait until it returns even when cancelled."""
    import asyncio

    call = in_thread(function, *arguments)
    cancelled: asyncio.CancelledError | None = None
    while not call.done():
        try:
            await asyncio.wait([call])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    call.result()
