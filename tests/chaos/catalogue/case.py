# SPDX-License-Identifier: MIT OR Apache-2.0
"""A case of the catalogue, and the register of all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# What the client of the request may get: an errno, the right answer, or one of both.
ERROR, RIGHT, EITHER = "error", "right", "either"
# What becomes of the server: it goes on serving, it ends, or either.
LIVES, ENDS, MAY_END = "lives", "ends", "may end"

PLAIN, WORKERS, TASKS, HANDLE, PULL = STYLES = ("plain", "workers", "tasks", "handle", "pull")
# Styles with methods, whose result counts.
METHODS = (PLAIN, WORKERS, TASKS)
# Styles that get requests as objects.
OBJECTS = (HANDLE, PULL)


@dataclass(frozen=True)
class Case:
    """One way to go wrong."""

    name: str
    act: Callable[..., Any]
    client: str = ERROR
    server: str = LIVES
    styles: tuple[str, ...] = STYLES
    operations: tuple[str, ...] = ("read", "write")
    # It harms the stand-in driver's client as well, which is a thread of the server.
    needs_kernel: bool = False
    # The request does not end by itself: what counts is that the server can be ended.
    blocks: bool = False


CASES: dict[str, Case] = {}


def case(client: str = ERROR, server: str = LIVES, **more: Any) -> Callable[[Callable], Callable]:
    """Adds a function to the catalogue."""

    def add(act: Callable) -> Callable:
        name = act.__name__
        assert name not in CASES, name
        CASES[name] = Case(name, act, client, server, **more)
        return act

    return add


def define(name: str, act: Callable, client: str = ERROR, server: str = LIVES, **more: Any) -> None:
    CASES[name] = Case(name, act, client, server, **more)


def right(disk, op, offset, buf) -> None:
    """Does what a right handler does."""
    disk.right(op, offset, buf)
