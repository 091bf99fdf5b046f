# SPDX-License-Identifier: MIT OR Apache-2.0
"""Python disks for measurements with and without a kernel."""

import asyncio
import time

import ublk


class Null(ublk.BlockDevice):
    """Does nothing."""

    def read(self, offset, buf):
        pass

    def write(self, offset, buf):
        pass


class Tasks(Null):
    """Does nothing, in coroutines."""

    async def read(self, offset, buf):
        pass

    async def write(self, offset, buf):
        pass


class Batch(ublk.BlockDevice):
    """Does nothing, for all requests of a wake-up."""

    def handle(self, requests):
        for request in requests:
            request.complete()


class Sleeping(ublk.BlockDevice):
    """Takes 10 ms for each request."""

    def read(self, offset, buf):
        time.sleep(0.01)


class SleepingTasks(ublk.BlockDevice):
    """Takes 10 ms for each request, in coroutines."""

    async def read(self, offset, buf):
        await asyncio.sleep(0.01)
