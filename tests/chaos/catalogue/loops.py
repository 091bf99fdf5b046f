# SPDX-License-Identifier: MIT OR Apache-2.0
"""Coroutines that meddle with their event loop."""

import asyncio

from .case import (
    EITHER,
    ERROR,
    MAY_END,
    TASKS,
    case,
    right,
)


@case(EITHER, MAY_END, styles=(TASKS,))
def stops_its_loop(disk, op, offset, buf):
    asyncio.get_running_loop().stop()
    right(disk, op, offset, buf)


@case(ERROR, styles=(TASKS,))
def closes_its_loop(*_):
    asyncio.get_running_loop().close()


@case(ERROR, styles=(TASKS,))
def cancels_itself(*_):
    async def body():
        asyncio.current_task().cancel()
        await asyncio.sleep(0)

    return body()


@case(EITHER, MAY_END, styles=(TASKS,))
def cancels_all_tasks(disk, op, offset, buf):
    async def body():
        for task in asyncio.all_tasks():
            task.cancel()
        await asyncio.sleep(0)
        right(disk, op, offset, buf)

    return body()


@case(ERROR, styles=(TASKS,))
def raises_CancelledError(*_):
    raise asyncio.CancelledError


@case(ERROR, styles=(TASKS,))
def runs_a_loop_inside(*_):
    async def nothing():
        pass

    coroutine = nothing()
    try:
        asyncio.run(coroutine)
    finally:
        coroutine.close()


@case(ERROR, styles=(TASKS,))
def awaits_what_cannot_be_awaited(*_):
    async def body():
        await 5

    return body()


@case(ERROR, styles=(TASKS,))
def times_out(*_):
    async def body():
        async with asyncio.timeout(0.01):
            await asyncio.sleep(10)

    return body()


@case(ERROR, styles=(TASKS,))
def yields_without_a_future(*_):
    class Bare:
        def __await__(self):
            yield 5

    async def body():
        await Bare()

    return body()
