# SPDX-License-Identifier: MIT OR Apache-2.0

"""The threads that serve requests."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# None of them may wait for requests: they may be its own.
threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def spawn(name: str, body: Callable[[], None]) -> None:
    """Start a thread that serves requests."""
    # A daemon, because the interpreter joins the others before it runs exit handlers, and it is one of those that
    # stops forgotten devices and joins these.
    thread = threading.Thread(target=body, name=name, daemon=True)
    threads.add(thread)
    thread.start()
