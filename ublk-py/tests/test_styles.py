# SPDX-License-Identifier: MIT OR Apache-2.0

"""The ways to get requests: pools of threads, event loops, batches, and taking them oneself."""

import asyncio
import concurrent.futures
import contextvars
import errno
import gc
import inspect
import select
import signal
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest
from support import until

import ublk
from ublk import _event_loop

SIZE = 1 << 20


def client_pool():
    return concurrent.futures.ThreadPoolExecutor(16)


class Waiting(ublk.BlockDevice):
    """A disk whose reads wait for each other, so many at a time."""

    def __init__(self, parties):
        super().__init__(size=SIZE)
        self.barrier = threading.Barrier(parties)
        self.threads = set()

    def read(self, offset, buf):
        self.threads.add(threading.current_thread())
        self.barrier.wait(10)
        buf[:] = (offset // 512).to_bytes(2, "little") * (len(buf) // 2)

    def write(self, offset, buf):
        if offset == 0:
            raise OSError(errno.ENOSPC, "full")
        if offset == 512:
            raise ZeroDivisionError
        raise SystemExit(3)


def read_together(driver, dev, count):
    """Read so many different sectors at the same time."""
    with client_pool() as pool:
        futures = [pool.submit(driver.read, dev.id, 512 * n, 512) for n in range(count)]
        for number, future in enumerate(futures):
            assert future.result() == number.to_bytes(2, "little") * 256


def check_exceptions(driver, dev, caplog):
    """Check that each write that raises fails with the right errno, and that SystemExit ends the device."""
    with pytest.raises(OSError) as raised:
        driver.write(dev.id, 0, bytes(512))
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(OSError) as raised:
        driver.write(dev.id, 512, bytes(512))
    assert raised.value.errno == errno.EIO
    assert "ZeroDivisionError" in caplog.text
    with pytest.raises(OSError):
        driver.write(dev.id, 1024, bytes(512))
    with pytest.raises(SystemExit):
        dev.wait(10)
    dev.stop()


def wakes_for_ctrl_c(waits):
    """Whether an event loop that waits for that alone heeds Ctrl-C, though another thread is the one it interrupts."""
    late = threading.Event()

    async def main():
        loop = asyncio.get_running_loop()

        def interrupt():
            signal.raise_signal(signal.SIGINT)
            if not over.wait(5):
                late.set()
                loop.call_soon_threadsafe(lambda: None)

        threading.Timer(0.1, interrupt).start()
        await waits()

    over = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    over.set()
    return not late.is_set()


class Interrupting:
    """A queue whose taker is interrupted by a signal before he knows what he has taken."""

    def __init__(self, queue):
        self.queue = queue

    def take(self, *arguments):
        batch = self.queue.take(*arguments)
        if batch:
            signal.raise_signal(signal.SIGTERM)
        return batch

    def take_into(self, count, requests):
        more = self.queue.take_into(count, requests)
        if requests:
            signal.raise_signal(signal.SIGTERM)
        return more

    def __getattr__(self, name):
        return getattr(self.queue, name)


class Interfering(ublk.BlockDevice):
    """A disk whose write to block 0 does something that would affect a later request of the same task."""

    def __init__(self, interfere):
        super().__init__(size=SIZE)
        self.interfere = interfere
        self.entered, self.go = threading.Event(), threading.Event()

    async def read(self, offset, buf):
        self.entered.set()
        self.go.wait(20)

    async def write(self, offset, buf):
        if offset == 0:
            self.interfere(asyncio.current_task())
        else:
            await asyncio.sleep(0.2)


class TestWorkers:
    def test_methods_that_wait_overlap(self, driver):
        disk = Waiting(8)
        with disk.start(depth=16, workers=8) as dev:
            read_together(driver, dev, 16)
        assert len(disk.threads) == 8

    def test_queues_share_them_and_each_has_one(self, driver):
        disk = Waiting(1)
        with disk.start(queues=3, depth=4, workers=2) as dev:
            read_together(driver, dev, 12)
            assert 1 <= len(disk.threads) <= 3

    def test_exceptions_are_those_of_the_request(self, driver, caplog):
        check_exceptions(driver, Waiting(1).start(workers=2), caplog)

    def test_memory_that_is_kept_never_sees_another_request(self, driver):
        kept = []

        class Keeper(ublk.BlockDevice):
            def read(self, offset, buf):
                buf[:] = bytes([len(kept)]) * len(buf)
                kept.append(numpy.frombuffer(buf, dtype=numpy.uint8))

        with Keeper(size=SIZE).start(depth=2, workers=2) as dev:
            for number in range(8):
                assert driver.read(dev.id, 0, 512) == bytes([number]) * 512
        assert [array[0] for array in kept] == list(range(8))

    def test_one_cannot_wait_for_its_own_device(self, driver):
        caught = []

        class Stopper(ublk.BlockDevice):
            def read(self, offset, buf):
                try:
                    self.device.stop()
                except RuntimeError as error:
                    caught.append(str(error))

        disk = Stopper(size=SIZE)
        with disk.start(workers=1) as disk.device:
            driver.read(disk.device.id, 0, 512)
        assert "cannot wait" in caught[0]


class Tasks(ublk.BlockDevice):
    """A disk of coroutines that wait for each other; and a plain flush."""

    def __init__(self, parties, **shape):
        super().__init__(size=SIZE, **shape)
        self.parties = parties
        self.arrived = 0
        self.loops = set()
        self.flushes = 0
        self.meeting = None

    async def read(self, offset, buf):
        self.loops.add(asyncio.get_running_loop())
        if self.parties > 1:
            self.meeting = self.meeting or asyncio.Event()
            self.arrived += 1
            if self.arrived == self.parties:
                self.meeting.set()
            await asyncio.wait_for(self.meeting.wait(), 10)
        buf[:] = (offset // 512).to_bytes(2, "little") * (len(buf) // 2)

    async def write(self, offset, buf):
        await asyncio.sleep(0)
        if offset == 0:
            raise OSError(errno.ENOSPC, "full")
        if offset == 512:
            raise ZeroDivisionError
        if offset == 1024:
            raise SystemExit(3)
        await asyncio.sleep(3600)

    def flush(self):
        self.flushes += 1


class TestCoroutines:
    def test_they_overlap_up_to_the_queue_depth(self, driver):
        disk = Tasks(16)
        with disk.start(depth=16) as dev:
            read_together(driver, dev, 16)
            driver.flush(dev.id)
        assert disk.flushes == 1

    def test_requests_after_one_that_waits_are_served(self, driver):
        class Mixed(ublk.BlockDevice):
            """Every other request waits until all have begun."""

            def __init__(self):
                super().__init__(size=SIZE)
                self.begun = 0
                self.all = asyncio.Event()

            async def read(self, offset, buf):
                self.begun += 1
                if self.begun == 16:
                    self.all.set()
                if offset // 512 % 2:
                    await self.all.wait()
                buf[:] = (offset // 512).to_bytes(2, "little") * (len(buf) // 2)

        with Mixed().start(depth=16) as dev:
            read_together(driver, dev, 16)

    def test_requests_before_one_that_waits_end(self, driver):
        class Last(ublk.BlockDevice):
            """The first request keeps the loop busy, and the last one waits until its client says so."""

            def __init__(self):
                super().__init__(size=SIZE)
                self.busy, self.free = threading.Event(), threading.Event()
                self.go = asyncio.Event()

            async def read(self, offset, buf):
                if offset == 0:
                    self.busy.set()
                    assert self.free.wait(60)
                if offset == 512 * 7:
                    self.loop = asyncio.get_running_loop()
                    await self.go.wait()

        disk = Last()
        with disk.start(depth=8) as dev, client_pool() as pool:
            first = pool.submit(driver.read, dev.id, 0, 512)
            assert disk.busy.wait(60)
            others = [pool.submit(driver.read, dev.id, 512 * n, 512) for n in range(1, 8)]
            # As many as come meanwhile are served together.
            time.sleep(0.1)
            disk.free.set()
            for client in [first, *others[:-1]]:
                client.result(60)
            assert not others[-1].done()
            until(lambda: hasattr(disk, "loop"))
            disk.loop.call_soon_threadsafe(disk.go.set)
            others[-1].result(60)

    def test_a_handler_that_cancels_its_task_cancels_no_other_request(self, driver):
        class Cancelling(ublk.BlockDevice):
            async def read(self, offset, buf):
                if offset == 0:
                    asyncio.current_task().cancel()
                else:
                    await asyncio.sleep(0)

        with Cancelling(size=SIZE).start(depth=16) as dev:
            for _ in range(20):
                driver.load(dev.id, 1, 16)

    @pytest.mark.parametrize(
        "interfere",
        [
            lambda task: (task.cancel(), task.uncancel()),
            lambda task: asyncio.get_running_loop().call_later(0.05, task.cancel),
        ],
        ids=["cancel and uncancel", "cancel later"],
    )
    def test_a_handler_that_has_its_task_cancels_no_later_request(self, driver, interfere):
        disk = Interfering(interfere)
        with disk.start() as dev, client_pool() as pool:
            pool.submit(driver.read, dev.id, 0, 512)
            assert disk.entered.wait(20)
            writes = []
            for n in range(3):
                writes.append(pool.submit(driver.write, dev.id, 4096 * n, bytes(512)))
                time.sleep(0.02)
            disk.go.set()
            # Those after the first one.
            for write in writes[1:]:
                write.result(20)

    def test_callbacks_of_a_task_run_when_its_request_ends(self, driver):
        class Locking(Interfering):
            lock = asyncio.Lock()

            async def write(self, offset, buf):
                await self.lock.acquire()
                asyncio.current_task().add_done_callback(lambda _: self.lock.release())

        disk = Locking(None)
        with disk.start() as dev, client_pool() as pool:
            futures = [pool.submit(driver.read, dev.id, 0, 512)]
            assert disk.entered.wait(20)
            for n in range(3):
                futures.append(pool.submit(driver.write, dev.id, 4096 * n, bytes(512)))
                time.sleep(0.02)
            disk.go.set()
            for future in futures:
                future.result(20)

    @pytest.mark.skipif(sys.version_info < (3, 12), reason="each request has a task of its own")
    def test_requests_that_change_nothing_share_a_task(self, driver):
        class Sharing(Interfering):
            tasks = 0

            async def write(self, offset, buf):
                async with asyncio.timeout(60):
                    asyncio.current_task().get_name()

        made = []
        disk = Sharing(None)
        with disk.start() as dev, client_pool() as pool:
            server = dev._serving._servers[0]
            make, server._task = server._task, lambda *arguments: made.append(1) or make(*arguments)
            futures = [pool.submit(driver.read, dev.id, 0, 512)]
            assert disk.entered.wait(20)
            for n in range(8):
                futures.append(pool.submit(driver.write, dev.id, 4096 * n, bytes(512)))
            time.sleep(0.3)
            disk.go.set()
            for future in futures:
                future.result(20)
        assert len(made) < 9

    def test_a_context_variable_of_one_request_is_unknown_to_the_next(self, driver):
        variable = contextvars.ContextVar("variable")
        found = []

        class Setting(ublk.BlockDevice):
            async def read(self, offset, buf):
                found.append(variable.get(None))
                # Cannot be compared: the truth of an array of two is ambiguous.
                variable.set(numpy.array([offset, offset]))

        with Setting(size=SIZE).start(depth=16) as dev:
            for _ in range(20):
                driver.load(dev.id, 1, 16)
        assert len(found) == 20 * 17
        assert all(value is None for value in found)

    def test_each_queue_has_a_loop_of_its_own(self, driver):
        disk = Tasks(1)
        with disk.start(queues=2) as dev:
            for number in range(8):
                driver.read(dev.id, number * 4096, 512)
        assert len(disk.loops) == 2
        until(lambda: all(loop.is_closed() for loop in disk.loops))

    def test_the_loop_is_made_as_asked_for(self, driver):
        made = []

        def factory():
            made.append(asyncio.new_event_loop())
            return made[-1]

        disk = Tasks(1)
        with disk.start(loop_factory=factory) as dev:
            driver.read(dev.id, 0, 512)
        assert list(disk.loops) == made

    def test_the_loop_may_be_uvloops(self, driver):
        uvloop = pytest.importorskip("uvloop")
        disk = Tasks(1)
        with disk.start(queues=2, loop_factory=uvloop.new_event_loop) as dev:
            driver.read(dev.id, 0, 512)

        async def main():
            async with await disk.start_async() as dev:
                await asyncio.to_thread(driver.read, dev.id, 0, 512)

        uvloop.run(main())
        assert {type(loop) for loop in disk.loops} == {uvloop.Loop}

    def test_exceptions_are_those_of_the_request(self, driver, caplog):
        check_exceptions(driver, Tasks(1).start(), caplog)

    def test_the_callers_loop_serves_a_device(self, driver):
        disk = Tasks(4)

        async def main():
            async with await disk.start_async(depth=4) as dev:
                reads = [asyncio.to_thread(driver.read, dev.id, 512 * n, 512) for n in range(4)]
                await asyncio.gather(*reads)
                assert disk.loops == {asyncio.get_running_loop()}
                with pytest.raises(RuntimeError, match="stop_async"):
                    dev.stop()
                assert dev.running

        asyncio.run(main())

    def test_requests_that_were_taken_when_a_signal_came_hold_up_no_stop(self, driver):
        async def main():
            async with await Tasks(1).start_async() as dev:
                devices.append(dev)
                server = dev._serving._servers[0]
                server._queue = Interrupting(server._queue)
                lost.append(pool.submit(driver.read, dev.id, 0, 512))
                await dev.wait_async()

        devices, lost = [], []
        with client_pool() as pool:
            with pytest.raises(SystemExit):
                asyncio.run(main())
            assert not devices[0].running
            # Served while the loop cancelled its tasks, or failed.
            lost[0].exception(10)

    def test_requests_taken_when_a_signal_handler_raised_are_served(self, driver):
        class Alarmed(Interrupting):
            def take_into(self, count, requests):
                more = self.queue.take_into(count, requests)
                if requests and not alarms:
                    alarms.append(1)
                    signal.raise_signal(signal.SIGALRM)
                return more

        def alarm(*_):
            raise ZeroDivisionError("the loop logs this and goes on")

        async def main():
            async with await Tasks(1).start_async() as dev:
                server = dev._serving._servers[0]
                server._queue = Alarmed(server._queue)
                await asyncio.wait_for(asyncio.to_thread(driver.read, dev.id, 0, 512), 30)

        alarms = []
        before = signal.signal(signal.SIGALRM, alarm)
        try:
            asyncio.run(main())
        finally:
            signal.signal(signal.SIGALRM, before)
        assert alarms

    def test_requests_taken_when_ctrl_c_came_are_served_when_the_loop_runs_again(self, driver):
        class Once(Interrupting):
            armed = True

            def take_into(self, count, requests):
                more = self.queue.take_into(count, requests)
                if requests and self.armed:
                    self.armed = False
                    signal.raise_signal(signal.SIGINT)
                return more

        loop = asyncio.new_event_loop()
        try:
            dev = loop.run_until_complete(Tasks(1).start_async())
            server = dev._serving._servers[0]
            server._queue = Once(server._queue)
            with client_pool() as pool:
                read = pool.submit(driver.read, dev.id, 0, 512)
                with pytest.raises(KeyboardInterrupt):
                    loop.run_forever()
                loop.run_until_complete(dev.stop_async(20))
                assert read.result(20) == bytes(512)
        finally:
            loop.close()

    def test_ctrl_c_between_two_requests_of_a_task_is_raised_once(self, driver):
        lines, first = inspect.getsourcelines(_event_loop.LoopServer._serve)
        place = first + next(n for n, line in enumerate(lines) if line.strip() == "request = None")
        reached = []

        def trace(frame, event, argument):
            if frame.f_code is not _event_loop.LoopServer._serve.__code__:
                return None
            if event == "line" and frame.f_lineno == place:
                reached.append(1)
                if len(reached) == 2:
                    raise KeyboardInterrupt
            return trace

        loop = asyncio.new_event_loop()
        logged = []
        loop.set_exception_handler(lambda loop, context: logged.append(context))
        before = sys.gettrace()
        try:
            dev = loop.run_until_complete(Tasks(1).start_async())
            with client_pool() as pool:
                read = pool.submit(driver.read, dev.id, 0, 512)
                sys.settrace(trace)
                with pytest.raises(KeyboardInterrupt):
                    loop.run_forever()
                sys.settrace(before)
                loop.run_until_complete(dev.stop_async(20))
                assert read.result(20) == bytes(512)
        finally:
            sys.settrace(before)
            loop.close()
        gc.collect()
        assert logged == []

    @pytest.mark.parametrize("is_lazy", [False, True])
    def test_an_exception_of_a_signal_handler_after_a_task_was_made_is_logged(self, driver, is_lazy):
        async def main():
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda loop, context: logged.append(context["exception"]))
            if is_lazy:
                loop.set_task_factory(lambda loop, coroutine, **options: asyncio.Task(coroutine, loop=loop, **options))
            async with await Slow(size=SIZE).start_async() as dev:
                server = dev._serving._servers[0]
                make = server._task

                def interrupted(*arguments):
                    server._task = make
                    task = make(*arguments)
                    kept.append(task) if is_lazy else None
                    raise ZeroDivisionError

                server._task = interrupted
                await asyncio.wait_for(asyncio.to_thread(driver.read, dev.id, 0, 512), 30)
                assert dev.running
                assert server._runs == {}

        class Slow(ublk.BlockDevice):
            async def read(self, offset, buf):
                await asyncio.sleep(0.05)

        logged, kept = [], []
        asyncio.run(main())
        gc.collect()
        assert [type(exception) for exception in logged] == [ZeroDivisionError]

    def test_a_handler_that_is_closed_stops_no_device(self, driver, caplog):
        class Closed(ublk.BlockDevice):
            async def read(self, offset, buf):
                if offset == 0:
                    raise GeneratorExit

        with Closed(size=SIZE).start() as dev:
            with pytest.raises(OSError):
                driver.read(dev.id, 0, 512)
            driver.read(dev.id, 512, 512)
            assert dev.running
        gc.collect()
        assert caplog.records == []

    def test_the_watchdog_fails_no_request_that_was_just_taken(self, driver):
        class Watched(Interrupting):
            def take_into(self, count, requests):
                more = self.queue.take_into(count, requests)
                server.fail_late(30)
                return more

        with Tasks(1).start() as dev:
            server = dev._serving._servers[0]
            server._taken_at = -100.0
            server._queue = Watched(server._queue)
            driver.read(dev.id, 0, 512)

    def test_ctrl_c_interrupts_an_asynchronous_wait(self, driver):
        with Tasks(1).start() as dev:
            assert wakes_for_ctrl_c(dev.wait_async)
            assert dev.running

    def test_a_wait_leaves_the_loops_own_signal_handlers_alone(self, driver):
        came = []

        async def main():
            loop = asyncio.get_running_loop()
            async with await Tasks(1).start_async() as dev:
                loop.add_signal_handler(signal.SIGUSR1, lambda: (came.append(True), stop.set()))
                stop = asyncio.Event()
                wait = asyncio.create_task(dev.wait_async())
                threading.Timer(0.1, signal.raise_signal, [signal.SIGUSR1]).start()
                await asyncio.wait_for(stop.wait(), 10)
                wait.cancel()

        asyncio.run(main())
        assert came

    def test_cancelled_tasks_fail_their_requests(self, driver):
        async def main():
            async with await Tasks(1).start_async() as dev:
                before = asyncio.all_tasks()
                write = asyncio.create_task(asyncio.to_thread(driver.write, dev.id, 4096, bytes(512)))
                while not (tasks := asyncio.all_tasks() - before - {write}):
                    await asyncio.sleep(0.001)
                for task in tasks:
                    task.cancel()
                with pytest.raises(OSError) as raised:
                    await write
                assert raised.value.errno == errno.ECANCELED

        asyncio.run(main())

    def test_a_loop_that_makes_no_task_fails_the_request(self, driver, caplog):
        async def main():
            loop = asyncio.get_running_loop()
            async with await Tasks(1).start_async() as dev:
                read = loop.run_in_executor(None, driver.read, dev.id, 0, 512)
                loop.set_task_factory(lambda loop, coroutine, **options: 1 / 0)
                try:
                    with pytest.raises(OSError) as raised:
                        await read
                finally:
                    loop.set_task_factory(None)
                assert raised.value.errno == errno.EIO

        asyncio.run(main())
        assert "ZeroDivisionError" in caplog.text

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    @pytest.mark.parametrize("where", ["handler", "first task", "a task of several"])
    def test_a_signal_in_a_handler_ends_the_callers_loop(self, driver, caplog, number, where):
        armed = threading.Event()

        def interrupt():
            if armed.is_set():
                armed.clear()
                signal.raise_signal(number)

        class Interrupted(ublk.BlockDevice):
            async def read(self, offset, buf):
                if where == "handler":
                    interrupt()

        def factory(loop, coroutine, **options):
            if where != "handler" and coroutine.__qualname__.startswith("LoopServer"):
                interrupt()
            return asyncio.Task(coroutine, loop=loop, **options)

        async def main():
            async with await Interrupted(size=SIZE).start_async() as dev:
                devices.append(dev)
                loop.set_task_factory(factory)
                # All of them are there when the loop looks for them.
                for n in range(3 if where == "a task of several" else 1):
                    reads.append(pool.submit(driver.read, dev.id, 4096 * n, 512))
                time.sleep(0.1)
                armed.set()
                await asyncio.sleep(60)

        devices, reads = [], []
        loop = asyncio.new_event_loop()
        # With -X dev the loop would log that `main` has blocked it.
        loop.slow_callback_duration = 60
        try:
            with client_pool() as pool:
                task = loop.create_task(main())
                with pytest.raises((SystemExit, KeyboardInterrupt)) as raised:
                    loop.run_until_complete(task)
                assert getattr(raised.value, "code", 128 + signal.SIGINT) == 128 + number
                assert devices[0].running, "it stops as if the handler had raised this"
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    loop.run_until_complete(task)
                errors = [read.exception(10) for read in reads]
        finally:
            loop.close()
        assert sum(error is not None for error in errors) == 1
        assert caplog.records == []

    def test_a_cancelled_start_leaves_nothing(self, driver):
        class Hanging(ublk.BlockDevice):
            async def read(self, offset, buf): ...

        async def main():
            task = asyncio.create_task(Hanging(size=SIZE).start_async())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())

    def test_a_device_whose_loop_is_closed_still_stops(self, driver):
        devices = []

        async def main():
            devices.append(await Tasks(1).start_async())

        asyncio.run(main())
        with client_pool() as pool:
            lost = pool.submit(driver.read, devices[0].id, 0, 512)
            time.sleep(0.05)
            devices[0].stop()
            with pytest.raises(OSError):
                lost.result(10)

    def test_a_plain_class_has_no_use_for_a_loop(self, driver):
        async def main():
            await Waiting(1).start_async()

        with pytest.raises(TypeError, match="no coroutine methods"):
            asyncio.run(main())


def handler(function, **more):
    """Make a disk whose `handle` is the given function."""

    class Handler(ublk.BlockDevice):
        operations = more.get("operations", ublk.BlockDevice.operations)

        def handle(self, requests):
            return function(requests)

    return Handler(size=SIZE)


class TestBatches:
    def test_requests_say_what_they_are(self, driver):
        seen = []

        def handle(requests):
            for request in requests:
                seen.append((request.op, request.offset, request.length, request.buffer.readonly, request.queue))
                if request.op is ublk.Op.READ:
                    request.buffer[:] = b"\x07" * request.length
                request.complete()
                assert request.done

        disk = handler(handle, operations=["write", "flush", "discard", "write_zeroes"])
        with disk.start() as dev:
            assert driver.read(dev.id, 1024, 512) == b"\x07" * 512
            driver.write(dev.id, 512, bytes(1024))
            driver.flush(dev.id)
            driver.discard(dev.id, 4096, 8192)
            driver.write_zeroes(dev.id, 8192, 512)
        assert seen == [
            ("read", 1024, 512, False, 0),
            ("write", 512, 1024, True, 0),
            ("flush", 0, 0, True, 0),
            ("discard", 4096, 8192, True, 0),
            ("write_zeroes", 8192, 512, True, 0),
        ]

    def test_all_requests_of_a_wake_up_come_at_once(self, driver):
        begun, go, sizes = threading.Event(), threading.Event(), []

        def handle(requests):
            begun.set()
            go.wait(10)
            sizes.append(len(requests))
            for request in requests:
                request.complete()

        with handler(handle).start() as dev, client_pool() as pool:
            futures = [pool.submit(driver.read, dev.id, 0, 512)]
            begun.wait(10)
            futures += [pool.submit(driver.read, dev.id, 512 * n, 512) for n in range(8)]
            time.sleep(0.2)
            go.set()
            for future in futures:
                future.result(10)
        assert sizes[0] == 1
        assert sum(sizes) == 9
        # All eight, unless the machine is so busy that some come late.
        assert max(sizes) > 1

    def test_requests_end_later_and_on_another_thread(self, driver):
        kept = []
        with handler(kept.extend).start(depth=4) as dev, client_pool() as pool:
            futures = [pool.submit(driver.read, dev.id, 512 * n, 512) for n in range(4)]
            while len(kept) < 4:
                time.sleep(0.001)
            for request in reversed(kept):
                request.buffer[:] = bytes([request.offset // 512]) * 512
                request.complete()
            assert [future.result(10) for future in futures] == [bytes([n]) * 512 for n in range(4)]

    def test_a_request_ends_once(self, driver):
        outcomes = []

        def handle(requests):
            for request in requests:
                view = request.buffer
                request.fail(errno.ENODATA)
                for action in (
                    request.complete,
                    request.fail,
                    lambda request=request: request.buffer,
                    lambda view=view: view[0],
                ):
                    with pytest.raises(ValueError):
                        action()
                outcomes.append(repr(request))

        with handler(handle).start() as dev, pytest.raises(OSError) as raised:
            driver.read(dev.id, 512, 1024)
        assert raised.value.errno == errno.ENODATA
        assert outcomes == ["<ublk.Request read 512+1024 of ublkb0 queue 0 done>"]

    @pytest.mark.parametrize("number", [41, 134, 600, 4095])
    def test_a_failure_of_any_number_is_a_failure(self, driver, number):
        def handle(requests):
            for request in requests:
                request.fail(number)

        with handler(handle).start() as dev:
            for call in (lambda: driver.write(dev.id, 0, bytes(512)), lambda: driver.read(dev.id, 0, 512)):
                with pytest.raises(OSError) as raised:
                    call()
                assert raised.value.errno == errno.EIO

    def test_a_dropped_request_is_eio_and_the_log_says_where(self, driver, caplog):
        def forget(request):
            del request  # here

        def handle(requests):
            while requests:
                forget(requests.pop())

        with handler(handle).start() as dev, pytest.raises(OSError) as raised:
            driver.read(dev.id, 0, 512)
        assert raised.value.errno == errno.EIO
        line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "# here" in text)
        assert f"{__file__}:{line} in forget" in caplog.text

    def test_a_request_left_by_a_handler_is_eio_and_the_log_says_so(self, driver, caplog):
        with handler(lambda requests: None).start() as dev, pytest.raises(OSError):
            driver.read(dev.id, 0, 512)
        assert "request read 0+512 of ublkb0 was dropped when its handler had returned" in caplog.text

    def test_an_exception_fails_the_requests_that_are_left(self, driver, caplog):
        def handle(requests):
            raise OSError(errno.ENOSPC, "full")

        with handler(handle).start() as dev, pytest.raises(OSError) as raised:
            driver.read(dev.id, 0, 512)
        assert raised.value.errno == errno.ENOSPC
        assert caplog.text == ""

        def mistake(requests):
            raise ZeroDivisionError

        with handler(mistake).start() as dev, pytest.raises(OSError) as raised:
            driver.read(dev.id, 0, 512)
        assert raised.value.errno == errno.EIO
        assert "ZeroDivisionError" in caplog.text

    def test_a_request_is_a_context_that_ends_it(self, driver):
        def handle(requests):
            for request in requests:
                with request:
                    if request.offset:
                        raise OSError(errno.ENODATA, "nothing there")
                    request.buffer[:] = b"x" * request.length

        with handler(handle).start() as dev:
            assert driver.read(dev.id, 0, 512) == b"x" * 512
            with pytest.raises(OSError) as raised:
                driver.read(dev.id, 512, 512)
            assert raised.value.errno == errno.ENODATA

    def test_memory_that_is_kept_never_sees_another_request(self, driver):
        kept = []

        def handle(requests):
            for request in requests:
                array = numpy.frombuffer(request.buffer, dtype=numpy.uint8)
                array[:] = len(kept)
                kept.append(array)
                request.complete()

        with handler(handle).start(depth=1) as dev:
            for number in range(4):
                assert driver.read(dev.id, 0, 512) == bytes([number]) * 512
        assert [array[0] for array in kept] == [0, 1, 2, 3]


class TestPulling:
    def disk(self, **more):
        return ublk.BlockDevice(size=SIZE, **more)

    @staticmethod
    def serve(requests):
        for request in requests:
            if request.op is ublk.Op.READ:
                request.buffer[:] = bytes([request.offset // 512 % 251]) * request.length
            request.complete()

    def test_threads_take_requests_in_turn(self, driver):
        with self.disk().start(queues=2, pull=True) as dev:
            requests = dev.requests()
            takers = [threading.Thread(target=self.serve, args=[requests]) for _ in range(3)]
            for taker in takers:
                taker.start()
            assert dev.wait_ready(10)
            for number in range(64):
                assert driver.read(dev.id, number * 512, 512) == bytes([number]) * 512
        for taker in takers:
            taker.join(10)
            assert not taker.is_alive()

    def test_tasks_take_requests(self, driver):
        async def main():
            with self.disk().start(pull=True) as dev:

                async def serve():
                    async for request in dev.requests():
                        with request:
                            request.buffer[:] = b"y" * request.length

                tasks = [asyncio.create_task(serve()) for _ in range(2)]
                assert await asyncio.to_thread(dev.wait_ready, 10)
                for _ in range(16):
                    assert await asyncio.to_thread(driver.read, dev.id, 0, 512) == b"y" * 512
                await dev.stop_async()
                await asyncio.wait_for(asyncio.gather(*tasks), 10)

        asyncio.run(main())

    def test_who_leaves_early_fails_what_is_there(self, driver):
        with self.disk().start(pull=True) as dev, client_pool() as pool:
            assert dev.wait_ready(10)
            first = pool.submit(driver.read, dev.id, 0, 512)
            for request in dev.requests():
                second = pool.submit(driver.read, dev.id, 0, 512)
                request.complete()
                break
            first.result(10)
            with pytest.raises(OSError):
                second.result(10)

    def test_a_device_that_nobody_serves_stops(self, driver):
        with self.disk().start(pull=True) as dev, client_pool() as pool:
            assert dev.wait_ready(10)
            lost = pool.submit(driver.read, dev.id, 0, 512)
            time.sleep(0.05)
            dev.stop()
            with pytest.raises(OSError):
                lost.result(10)

    def test_an_iteration_that_is_left_with_a_request_in_hand_holds_up_no_stop(self, driver, caplog):
        with client_pool() as pool:
            with pytest.raises(ZeroDivisionError), self.disk().start(pull=True) as dev:
                assert dev.wait_ready(10)
                lost = pool.submit(driver.read, dev.id, 0, 512)
                for request in dev.requests():  # noqa: B007
                    1 / 0  # noqa: B018
            # It is held, and so not dropped.
            assert request.done
            with pytest.raises(OSError):
                lost.result(10)
        assert "was dropped" in caplog.text

    def test_a_request_that_was_handed_on_is_ended_by_whoever_has_it(self, driver):
        with client_pool() as pool:
            with self.disk().start(pull=True) as dev:
                assert dev.wait_ready(10)
                read = pool.submit(driver.read, dev.id, 0, 512)
                for request in dev.requests():
                    request.buffer[:] = bytes(512)
                    threading.Timer(0.2, request.complete).start()
                    break
            assert read.result(10) == bytes(512)

    def test_a_request_that_was_taken_when_a_signal_came_holds_up_no_stop(self, driver):
        with client_pool() as pool:
            with pytest.raises(SystemExit), self.disk().start(pull=True) as dev:
                assert dev.wait_ready(10)
                requests = dev.requests()
                requests._queues = tuple(map(Interrupting, requests._queues))
                lost = pool.submit(driver.read, dev.id, 0, 512)
                self.serve(requests)
            assert not dev.running
            with pytest.raises(OSError):
                lost.result(10)

    def test_ctrl_c_interrupts_an_asynchronous_iteration(self, driver):
        with self.disk().start(pull=True) as dev:
            assert dev.wait_ready(10)

            async def serve():
                async for request in dev.requests():
                    request.complete()

            assert wakes_for_ctrl_c(serve)

    def test_ctrl_c_interrupts_the_iteration(self, driver):
        with self.disk().start(pull=True) as dev:
            assert dev.wait_ready(10)
            threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()
            with pytest.raises(KeyboardInterrupt):
                self.serve(dev.requests())

    def test_only_a_pulling_device_gives_requests(self, driver):
        with Waiting(1).start() as dev, pytest.raises(TypeError, match="pull=True"):
            dev.requests()


@pytest.mark.parametrize(
    ("disk", "options", "kind", "words"),
    [
        (Waiting(1), {"pull": True}, TypeError, "never call"),
        (Waiting(1), {"workers": 0}, ValueError, "workers = 0"),
        (Waiting(1), {"workers": "2"}, TypeError, "workers"),
        (Waiting(1), {"loop_factory": asyncio.new_event_loop}, ValueError, "no coroutine"),
        (Tasks(1), {"workers": 2}, ValueError, "workers cannot call"),
        (handler(print), {"workers": 2}, ValueError, "cannot be combined with workers"),
        (handler(print, operations=["reed"]), {}, ValueError, "write_zeroes"),
        (ublk.BlockDevice(size=SIZE), {}, TypeError, "no read"),
        (ublk.BlockDevice(size=SIZE), {"pull": True, "workers": 1}, ValueError, "pull=True cannot be combined"),
    ],
)
def test_what_does_not_go_together_is_refused(driver, disk, options, kind, words):
    with pytest.raises(kind, match=words):
        disk.start(**options)


def test_a_class_with_two_kinds_of_handlers_is_refused(driver):
    class Both(ublk.BlockDevice):
        def read(self, offset, buf): ...
        def handle(self, requests): ...

    with pytest.raises(TypeError, match="define only one of them"):
        Both(size=SIZE).start()


class TestEnds:
    """What serves a device may end before it does."""

    def test_a_loop_that_cannot_be_made_fails_the_start(self, driver):
        def factory():
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            Tasks(1).start(loop_factory=factory)

    def test_a_loop_that_dies_ends_its_device(self, driver, caplog):
        class Dying(ublk.BlockDevice):
            async def read(self, offset, buf):
                async def background():
                    raise SystemExit(4)

                self.task = asyncio.create_task(background())
                self.task.add_done_callback(lambda task: task.exception())
                await asyncio.sleep(20)

        dev = Dying(size=SIZE).start()
        with pytest.raises(OSError):
            driver.read(dev.id, 0, 512)
        with pytest.raises((SystemExit, RuntimeError)):
            dev.wait(10)
        dev.stop()

    def test_a_loop_that_is_closed_ends_its_device(self, driver):
        async def main():
            return await Tasks(1).start_async()

        dev = asyncio.run(main())
        with pytest.raises(RuntimeError, match="event loop"):
            dev.wait(10)
        dev.stop()

    def test_a_loop_that_does_not_run_is_no_reason_to_wait(self, driver):
        loop = asyncio.new_event_loop()
        try:
            dev = loop.run_until_complete(Tasks(1).start_async())
            with client_pool() as pool:
                lost = pool.submit(driver.read, dev.id, 0, 512)
                time.sleep(0.05)
                dev.stop()
                with pytest.raises(OSError):
                    lost.result(10)
            loop.run_until_complete(asyncio.sleep(0))
        finally:
            loop.close()

    @pytest.mark.parametrize("way", ["break", "generator", "in the body"])
    def test_a_consumer_that_stops_its_device_does_not_wait_for_itself(self, driver, way):
        dev = ublk.BlockDevice(size=SIZE).start(pull=True)
        with client_pool() as pool:
            assert dev.wait_ready(10)
            clients = [pool.submit(driver.read, dev.id, 0, 512) for _ in range(3)]
            iterator = iter(dev.requests())
            for request in iterator:
                request.complete()
                if way == "in the body":
                    dev.stop()
                break
            if way == "break":
                del iterator
            dev.stop()
            assert sum(client.exception(10) is None for client in clients) == 1

    def test_an_async_consumer_that_left_is_waited_for_by_nobody(self, driver):
        async def main():
            dev = ublk.BlockDevice(size=SIZE).start(pull=True)
            assert await asyncio.to_thread(dev.wait_ready, 10)
            clients = [asyncio.ensure_future(asyncio.to_thread(driver.read, dev.id, 0, 512)) for _ in range(2)]
            async for request in dev.requests():
                request.complete()
                break
            dev.stop()
            results = await asyncio.gather(*clients, return_exceptions=True)
            assert sum(isinstance(result, OSError) for result in results) == 1

        asyncio.run(main())

    def test_iterating_over_what_has_ended_ends_at_once(self, driver):
        dev = ublk.BlockDevice(size=SIZE).start(pull=True)
        assert dev.wait_ready(10)
        dev.stop()
        assert list(dev.requests()) == []

        async def main():
            return [request async for request in dev.requests()]

        assert asyncio.run(main()) == []

    def test_closing_requests_ends_whoever_waits_for_some(self, driver):
        with ublk.BlockDevice(size=SIZE).start(pull=True) as dev:
            assert dev.wait_ready(10)
            waiter = threading.Thread(target=lambda: list(dev.requests()))
            waiter.start()
            time.sleep(0.05)
            dev.requests().close()
            waiter.join(10)
            assert not waiter.is_alive()

    def test_a_refused_quiesce_leaves_a_pulling_device_alone(self, driver):
        with ublk.BlockDevice(size=SIZE).start(pull=True) as dev:
            assert dev.wait_ready(10)
            taker = threading.Thread(target=TestPulling.serve, args=[dev.requests()])
            taker.start()
            with pytest.raises(ublk.UblkError, match="not started with recoverable"):
                dev.quiesce()
            assert driver.read(dev.id, 512, 512) == b"\x01" * 512
            dev.stop()
            taker.join(10)


def test_a_busy_queue_does_not_keep_another_from_being_served(driver):
    with ublk.BlockDevice(size=SIZE).start(queues=2, depth=64, pull=True) as dev, client_pool() as pool:
        assert dev.wait_ready(10)
        # Which queue a request goes to depends on its place, here.
        clients = [pool.submit(driver.read, dev.id, 8192 * n, 512) for n in range(12)]
        other = pool.submit(driver.read, dev.id, 4096, 512)
        for queue in dev._native.pull_queues:
            assert select.select([queue], [], [], 10)[0] == [queue]
        seen = []
        for request in dev.requests():
            seen.append(request.queue)
            request.complete()
            if len(seen) == 13:
                break
        assert set(seen[:2]) == {0, 1}
        for client in [*clients, other]:
            client.result(10)


def test_a_list_of_requests_may_be_handed_on(driver):
    batches, done = [], threading.Event()

    def worker():
        while not done.wait(0.001):
            for requests in batches:
                while requests:
                    requests.pop().complete()

    thread = threading.Thread(target=worker)
    thread.start()
    with handler(batches.append).start() as dev:
        driver.read(dev.id, 0, 512)
        driver.write(dev.id, 0, bytes(512))
    done.set()
    thread.join(10)
