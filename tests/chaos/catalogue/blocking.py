# SPDX-License-Identifier: MIT OR Apache-2.0
"""Handlers that are slow or never return."""

import asyncio
import contextlib
import os
import threading
import time

from .case import (
    EITHER,
    MAY_END,
    RIGHT,
    TASKS,
    case,
    right,
)


@case(RIGHT)
def takes_three_seconds(disk, op, offset, buf):
    time.sleep(3)
    right(disk, op, offset, buf)


@case(EITHER, MAY_END, blocks=True)
def sleeps_for_ever(*_):
    time.sleep(1e6)


@case(EITHER, MAY_END, blocks=True)
def computes_for_ever(*_):
    while True:
        pass


@case(EITHER, MAY_END, blocks=True)
def waits_for_a_lock_it_has(*_):
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


@case(EITHER, MAY_END, blocks=True)
def reads_a_pipe_without_a_writer(*_):
    os.read(os.pipe()[0], 1)


@case(EITHER, MAY_END, blocks=True)
def waits_for_an_event(*_):
    threading.Event().wait()


@case(EITHER, MAY_END, blocks=True)
def sleeps_and_swallows_everything(*_):
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(1e6)


@case(EITHER, MAY_END, styles=(TASKS,), blocks=True)
def awaits_for_ever(*_):
    return asyncio.Event().wait()


@case(EITHER, MAY_END, styles=(TASKS,), blocks=True)
def swallows_cancellation(*_):
    async def body():
        while True:
            with contextlib.suppress(BaseException):
                await asyncio.sleep(1e6)

    return body()
