# SPDX-License-Identifier: MIT OR Apache-2.0

"""The event loop of the caller."""

from __future__ import annotations

import asyncio
import sys


def event_loop(caller: str) -> asyncio.AbstractEventLoop:
    """Return the running event loop. Raises `RuntimeError` if there is none of asyncio's."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        text = f"{caller} needs a running event loop of asyncio"
        trio = sys.modules.get("trio")
        if trio is not None and trio.lowlevel.in_trio_run():
            text += ", and this is trio: use start() and stop() there, by trio.to_thread.run_sync"
        raise RuntimeError(text) from None
