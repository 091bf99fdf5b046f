# SPDX-License-Identifier: MIT OR Apache-2.0
"""Bad environments: what a disk of ours stands on fails, fills up or vanishes, limits are low, CPUs and clocks change.

Each round is one of the functions below, whose names begin with `in_`, with a load of clients that check data. They may
get errors where the environment is to blame; what was acknowledged must be there, requests must end, and the disk
must be removable afterwards.
"""

import contextlib
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from support.blockio import Disk, error_of
from support.command import run
from support.face import NATIVE, device_id
from support.pace import patience
from support.processes import blocked_stacks
from support.waiting import until
from tools import rig
from tools.findings import Findings, Stuck
from tools.history import FOREIGN, History, Wrong
from tools.load import Client, lay_out
from tools.store import Store

SIZE = 8 << 20
FILES = Path("/root/chaos")


def campaign(findings: Findings, rounds: int, only: Iterable[str], plant: str) -> None:
    FILES.mkdir(exist_ok=True)
    ways = [value for name, value in sorted(globals().items()) if name.startswith("in_")]
    ways = [way for way in ways if not set(only) or way.__name__.removeprefix("in_") in set(only)]
    if plant:
        ways = [planted_wrong_bytes]
    for number in range(rounds):
        if findings.time_is_over():
            break
        turn, index = divmod(number, len(ways))
        # Each of them once before one comes again.
        order = ways[:]
        random.Random(f"{findings.seed}/environment/{turn}").shuffle(order)
        way = order[index]
        findings.round = number
        began = time.monotonic()
        try:
            way(World(findings, way.__name__.removeprefix("in_"), random.Random(f"{findings.seed}/{number}"), number))
        except (AssertionError, OSError) as error:
            findings.add(f"environment {way.__name__.removeprefix('in_')}: it does not come to its end", error)
            run(["ublk", "del", "-a", "--force"], check=False, timeout=90)
        findings.say(f"{way.__name__}: {time.monotonic() - began:.0f} s")
        findings.count(environments=1)


class World:
    """A disk under load in a bad environment."""

    def __init__(self, findings: Findings, name: str, dice: random.Random, number: int) -> None:
        self._findings = findings
        self.name = name
        self.dice = dice
        self._number = number
        self.history = History(1, [])

    def add_finding(self, what: str, detail: object = "") -> None:
        self._findings.add(f"environment {self.name}: {what}", detail)

    @contextlib.contextmanager
    def disk(self, *words: str, queues: int = 2) -> Iterator[str]:
        """A disk of the Rust program, seen to be removable."""
        path = NATIVE.add(*words, "-q", str(queues), timeout=60)
        try:
            yield path
        finally:
            done = NATIVE.run("del", "-n", str(device_id(path)), timeout=90, check=False)
            if done.status:
                self.add_finding("the disk cannot be removed", done)
                NATIVE.run("del", "--force", "-n", str(device_id(path)), timeout=90, check=False)
            until(lambda: not os.path.exists(path), f"the end of {path}", 30)

    @contextlib.contextmanager
    def load(self, path: str, *, size: int = SIZE, errors: bool = True) -> Iterator[list[Client]]:
        """Clients beside the block. Afterwards, checks what they read and what was acknowledged."""
        parts = lay_out(self.dice, size, 2, 4096)
        self.history = History(self._number + 1, [extent for part in parts for extent in part])
        clients = [
            Client(path, self.history, part, f"{self._number}/{index}", cpu=index) for index, part in enumerate(parts)
        ]
        for client in clients:
            client.start()
        try:
            yield clients
        finally:
            for client in clients:
                client.stop()
            for client in clients:
                client.join(patience(90))
                if client.is_alive():
                    raise Stuck(f"{self.name}: a client does not end", blocked_stacks())
        self.report([wrong for client in clients for wrong in client.wrong])
        failed = [error for client in clients for _, error in client.errors]
        if failed and not errors:
            self.add_finding("requests fail", failed[0])
        self._findings.count(writes=sum(client.counts.writes for client in clients), errors=len(failed))

    def gets_on(self, clients: list[Client], seconds: float = 60) -> None:
        """Waits until each client has had a success from now on."""
        now = time.monotonic()
        for client in clients:
            try:
                until(lambda client=client: client.last > now, "a client gets on", seconds)
            except AssertionError as error:
                self.add_finding("clients do not get on", f"{error}\n{blocked_stacks()}")

    def check(self, path: str) -> None:
        """Compares the disk with what was acknowledged."""
        with Disk(path, direct=True, read_only=True) as disk:
            for extent in self.history.extents:
                self.report(self.history.check_live(extent, disk.read(extent.offset, extent.length)))

    def report(self, found: list[Wrong]) -> None:
        for wrong in found[:3]:
            self.add_finding(wrong.kind, wrong)


def image(name: str = "world.img", size: int = SIZE) -> str:
    path = FILES / name
    with path.open("wb") as file:
        file.truncate(size)
    return str(path)


def in_a_full_file_system(world: World) -> None:
    place = Path("/mnt/full")
    place.mkdir(exist_ok=True)
    run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place])
    try:
        file = place / "disk.img"
        with file.open("wb") as opened:
            opened.truncate(SIZE)
        with world.disk("-t", "file", "-f", str(file)) as path:
            filler = place / "filler"
            with world.load(path) as clients:
                time.sleep(1)
                with contextlib.suppress(OSError), filler.open("wb") as opened:
                    while True:
                        opened.write(bytes(1 << 16))
                        opened.flush()
                time.sleep(1)
                filler.unlink()
                run(["mount", "-o", "remount,size=32m", place])
                world.gets_on(clients)
            world.check(path)
    finally:
        run(["umount", place], timeout=60)


def in_a_store_whose_requests_fail(world: World) -> None:
    with Store(SIZE, seed=world.dice.randrange(1 << 30)) as store:
        io = world.dice.choice(("direct", "buffered"))
        with world.disk("-t", "file", "-f", store.path, "--io", io) as path:
            with world.load(path) as clients:
                for kind in world.dice.sample(("read", "write", "flush"), 2):
                    time.sleep(0.5)
                    store.fail(kind)
                    time.sleep(1)
                    store.fail(None)
                    world.gets_on(clients)
            log = store.take_log()
            # Nothing but what flushes have made stable: none of those that succeeded may have covered what failed.
            cut = time.monotonic_ns()
            world.report(world.history.check_all(cut, log.cut(cut, world.dice, "nothing").read))


def in_a_store_that_vanishes(world: World) -> None:
    store = Store(SIZE, seed=world.dice.randrange(1 << 30))
    with world.disk("-t", "file", "-f", store.path) as path, world.load(path):
        time.sleep(1)
        store.process.kill()
        rig.wait_for_end(store.pid)
        time.sleep(1)
    store.close()
    run(["ublk", "del", "--dead"], timeout=90, check=False)


def in_a_file_that_is_unlinked(world: World) -> None:
    file = image()
    with world.disk("-t", "file", "-f", file) as path:
        with world.load(path, errors=False) as clients:
            time.sleep(0.5)
            os.unlink(file)
            world.gets_on(clients)
        world.check(path)


def in_a_file_that_is_truncated(world: World) -> None:
    file = image()
    with world.disk("-t", "file", "-f", file) as path:
        with world.load(path) as clients:
            time.sleep(0.5)
            os.truncate(file, 0)
            for client in clients:
                client.stop()
        # What was there is gone; nothing else may come in its place.
        with Disk(path, direct=True, read_only=True) as disk:
            for extent in world.history.extents:
                with contextlib.suppress(OSError):
                    wrong = world.history.check_live(extent, disk.read(extent.offset, extent.length))
                    world.report([one for one in wrong if one.kind == FOREIGN])


def in_few_descriptors(world: World) -> None:
    _limited(world, resource.RLIMIT_NOFILE, world.dice.choice((4, 8, 12, 16, 24)))


def in_little_address_space(world: World) -> None:
    _limited(world, resource.RLIMIT_AS, world.dice.choice((32, 64, 128)) << 20)


def in_small_files(world: World) -> None:
    _limited(world, resource.RLIMIT_FSIZE, world.dice.choice((0, 4096, 1 << 20)))


def _limited(world: World, which: int, limit: int) -> None:
    """A disk that is made within a limit: it works, or there is an error with a message."""
    file = image()
    process = subprocess.run(
        ["ublk", "add", "-t", "file", "-f", file],
        preexec_fn=lambda: resource.setrlimit(which, (limit, limit)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=False,
    )
    if process.returncode:
        if not process.stderr.strip() and process.returncode != -signal.SIGABRT:
            world.add_finding("an error without a message", f"limit {limit}, status {process.returncode}")
        if "panicked" in process.stderr:
            world.add_finding("a panic", f"limit {limit}: {process.stderr[-500:]}")
        return
    path = process.stdout.strip()
    with world.load(path):
        time.sleep(1)
    done = NATIVE.run("del", "-n", str(device_id(path)), timeout=90, check=False)
    if done.status:
        world.add_finding("the disk cannot be removed", f"limit {limit}: {done}")
        NATIVE.run("del", "--force", "-n", str(device_id(path)), timeout=90)


def in_a_kernel_without_io_uring(world: World) -> None:
    switch = Path("/proc/sys/kernel/io_uring_disabled")
    if not switch.exists():
        return
    file = image()
    with world.disk("-t", "file", "-f", file) as path:
        switch.write_text("2")
        try:
            # A server that is there goes on.
            with world.load(path, errors=False) as clients:
                world.gets_on(clients)
            done = NATIVE.run("add", "-t", "null", "--size", "16M", check=False, timeout=60)
            if done.status != 1 or "io_uring" not in done.err:
                world.add_finding("the error does not name io_uring", done)
        finally:
            switch.write_text("0")
        world.check(path)


def in_cpus_that_come_and_go(world: World) -> None:
    online = Path("/sys/devices/system/cpu/cpu1/online")
    cpus = world.dice.choice(("auto", "off", "1"))
    with world.disk("-t", "file", "-f", image(), "--cpus", cpus) as path:
        with world.load(path, errors=False) as clients:
            try:
                for _ in range(4):
                    time.sleep(world.dice.random())
                    online.write_text("0")
                    world.gets_on(clients)
                    online.write_text("1")
            finally:
                online.write_text("1")
            world.gets_on(clients)
        world.check(path)


def in_clocks_that_jump(world: World) -> None:
    with world.disk("-t", "file", "-f", image()) as path:
        with world.load(path, errors=False) as clients:
            offset = 0
            try:
                for _ in range(4):
                    jump = world.dice.choice((-1, 1)) * world.dice.choice((1, 3600, 86400 * 365))
                    time.clock_settime(time.CLOCK_REALTIME, time.time() + jump)
                    offset += jump
                    world.gets_on(clients)
            finally:
                time.clock_settime(time.CLOCK_REALTIME, time.time() - offset)
        world.check(path)


def in_a_server_that_is_stopped_for_a_while(world: World) -> None:
    with world.disk("-t", "file", "-f", image()) as path:
        pid = NATIVE.info(path)["pid"]
        with world.load(path, errors=False) as clients:
            for _ in range(3):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(world.dice.random() * 2)
                os.kill(pid, signal.SIGCONT)
                world.gets_on(clients)
        world.check(path)


def in_a_run_directory_that_cannot_be_written(world: World) -> None:
    place = Path("/run/ublk")
    place.mkdir(exist_ok=True)
    run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place])
    try:
        done = NATIVE.run("add", "-t", "mem", "--size", "16M", "--recovery", check=False, timeout=60)
        if done.status == 0:
            NATIVE.run("del", "--force", "-n", str(device_id(done.out.strip())), timeout=60)
            world.add_finding("a disk that outlives its server is made without a state file", done)
        elif not done.err.strip():
            world.add_finding("an error without a message", done)
    finally:
        run(["umount", place])


def in_closed_standard_streams(world: World) -> None:
    streams = world.dice.choice(("<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full >/dev/full"))
    before = set(Path("/dev").glob("ublkb*"))
    run(["sh", "-c", f"ublk add -t file -f {image()} {streams}"], check=False, timeout=60)
    for made in set(Path("/dev").glob("ublkb*")) - before:
        if number := error_of(lambda path=str(made): Disk(path, direct=True).close()):
            world.add_finding("a disk cannot be opened", os.strerror(number))
        NATIVE.run("del", "-n", str(device_id(str(made))), timeout=60)


def planted_wrong_bytes(world: World) -> None:
    """The planted fault: another process writes to the backing file."""
    file = image()
    with world.disk("-t", "file", "-f", file) as path, world.load(path):
        time.sleep(1)
        with open(file, "r+b") as opened:
            for one in world.history.extents:
                opened.seek(one.offset)
                opened.write(b"\x77" * 512)
                opened.flush()
                os.fsync(opened.fileno())
        time.sleep(1)
