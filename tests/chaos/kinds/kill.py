# SPDX-License-Identifier: MIT OR Apache-2.0
"""Servers killed on slow stores, in every recovery mode, under clients that check data.

Each round is one death. Clients read and write throughout. After the next server has come, each client must get on;
with `reissue` no request may fail, with the other modes only those of the time without a server. Nothing that was
acknowledged may be lost or replaced by an older write. Without recovery the disk is gone after the death, and the next
one is made on the same store.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from support.blockio import Disk
from support.features import has
from support.waiting import until
from tools import rig
from tools.findings import Findings, Stuck
from tools.history import History, Wrong
from tools.load import Client, lay_out
from tools.store import Store

SIZE = 16 << 20
CLIENTS = 4
DEATHS = 5
# Seconds to wait for a write, however slow the store is.
LONGEST = 10.0
NUISANCE = Path(__file__).resolve().parent.parent / "tools/nuisance.py"
DISKS = ("file-direct", "file-buffered", "python", "python-mapped", "python-coroutines")


def campaign(findings: Findings, rounds: int, only: Iterable[str], plant: str) -> None:
    modes = ["reissue", "queue", "none"] + (["fail-io"] if has("USER_RECOVERY_FAIL_IO") else [])
    only = list(only)
    disks = [name for name in DISKS if name in only or not set(only) & set(DISKS)]
    modes = [mode for mode in modes if mode in only or not set(only) & set(modes)]
    done = session = 0
    while done < rounds and not findings.time_is_over():
        dice = random.Random(f"{findings.seed}/kill/{session}")
        # Every mode meets every disk in turn.
        kind = rig.PLANTED[plant] if plant else rig.KINDS[disks[(session + session // len(modes)) % len(disks)]]
        deaths = min(DEATHS, rounds - done)
        made = Session(findings, kind, modes[session % len(modes)], dice, session, done, deaths, plant)
        try:
            made.run()
        except (AssertionError, OSError) as error:
            findings.add(f"{kind.name}: a session does not come to its end", f"{made}: {error}")
            rig.clear()
        done += deaths
        session += 1


class Session:
    """A disk on a slow store with its clients, through several deaths."""

    def __init__(
        self,
        findings: Findings,
        kind: rig.Kind,
        mode: str,
        dice: random.Random,
        number: int,
        first: int,
        deaths: int,
        plant: str,
    ) -> None:
        self._findings = findings
        self._kind = kind
        self._mode = mode
        self._dice = dice
        self._number = number
        self._first = first
        self._deaths = deaths
        self._queues = dice.choice((1, 2, 2))
        self._slow = dice.choice((0, 20, 200, 1000))
        self._nuisances = not plant and dice.random() < 0.4
        # The times between a death and the next server's arrival.
        self._without: list[tuple[int, int]] = []

    def __str__(self) -> str:
        more = ", with nuisances" if self._nuisances else ""
        return (
            f"session {self._number} ({self._kind.name}, {self._mode}, {self._queues} queues, "
            f"store up to {self._slow} ms slow{more})"
        )

    def run(self) -> None:
        self._findings.round = self._first
        with Store(SIZE, slow=self._slow, seed=self._dice.randrange(1 << 30)) as store:
            upper = self._add(store)
            parts = lay_out(self._dice, SIZE, CLIENTS, 512)
            self._history = History(self._number + 1, [extent for part in parts for extent in part])
            clients = [
                Client(upper.path, self._history, part, f"{self._findings.seed}/kill/{self._number}/{index}", cpu=index)
                for index, part in enumerate(parts)
            ]
            with contextlib.ExitStack() as stack:
                if self._nuisances:
                    stack.enter_context(annoyed(upper.path, self._dice))
                for client in clients:
                    client.start()
                try:
                    for death in range(self._deaths):
                        self._findings.round = self._first + death
                        upper = self._die(store, upper, clients)
                finally:
                    for client in clients:
                        client.stop()
                self._join(clients)
            self._judge(upper, clients)
            upper.remove()
            upper.close()
        self._findings.say(f"{self}: {self._deaths} deaths, findings so far: {sum(self._findings.counts.values())}")

    def _add(self, store: Store) -> rig.Upper:
        recovery = "" if self._mode == "none" else self._mode
        return rig.add(self._kind, store.path, self._dice, queues=self._queues, recovery=recovery)

    def _die(self, store: Store, upper: rig.Upper, clients: list[Client]) -> rig.Upper:
        self._let_work(clients)
        began = time.monotonic_ns()
        upper.kill()
        if self._mode == "none":
            upper.close()
            upper = self._replace(store, upper)
        else:
            # Now and then requests wait for a while.
            time.sleep(self._dice.choice((0, 0, 0.3)))
            upper.recover()
        self._without.append((began, time.monotonic_ns()))
        came = time.monotonic()
        for client in clients:
            try:
                until(lambda client=client: client.last > came, "a client gets on", 90)
            except AssertionError:
                raise Stuck(f"{self}: a client does not get on after a death", rig.blocked_stacks()) from None
        self._findings.count(deaths=1)
        return upper

    def _let_work(self, clients: list[Client]) -> None:
        """Waits until the server is to die: some time, or until a write has just been acknowledged."""
        time.sleep(self._dice.random() * self._dice.choice((0.05, 0.5, 2)))
        if self._dice.random() < 0.5:
            before = sum(client.counts.writes for client in clients)
            deadline = time.monotonic() + LONGEST
            while sum(client.counts.writes for client in clients) == before and time.monotonic() < deadline:
                time.sleep(0.0005)

    def _replace(self, store: Store, upper: rig.Upper) -> rig.Upper:
        """Makes another disk in place of one that ended with its server."""
        rig.NATIVE.run("del", "--force", "-n", str(upper.id), timeout=rig.NOTICE, check=False)
        until(lambda: not Path(upper.path).exists(), f"the end of {upper.path}", 60)
        replaced = self._add(store)
        if replaced.path != upper.path:
            self._findings.add("a number is not free after its device has gone", f"{self}: {replaced.path}")
        return replaced

    def _join(self, clients: list[Client]) -> None:
        for client in clients:
            client.join(90)
            if client.is_alive():
                raise Stuck(f"{self}: a client does not end", rig.blocked_stacks())

    def _judge(self, upper: rig.Upper, clients: list[Client]) -> None:
        found = [wrong for client in clients for wrong in client.wrong]
        with Disk(upper.path, direct=True, read_only=True) as disk:
            for extent in self._history.extents:
                found += self._history.check_live(extent, disk.read(extent.offset, extent.length))
        self._report(found)
        for client in clients:
            for when, error in client.errors:
                if self._mode == "reissue":
                    self._findings.add(f"{self._kind.name}: a request fails in spite of reissue", f"{self}: {error}")
                elif not any(began <= when <= ended + 2_000_000_000 for began, ended in self._without):
                    self._findings.add(f"{self._kind.name}: a request fails beside no death", f"{self}: {error}")
        self._findings.count(
            sessions=1,
            writes=sum(client.counts.writes for client in clients),
            reads=sum(client.counts.reads for client in clients),
            errors=sum(client.counts.errors for client in clients),
        )

    def _report(self, found: list[Wrong]) -> None:
        for kind in sorted({wrong.kind for wrong in found}):
            of_kind = [wrong for wrong in found if wrong.kind == kind]
            self._findings.add(
                f"{self._kind.name}, {self._mode}: {kind}", f"{self}: {of_kind[0]}; {len(of_kind)} sectors"
            )


@contextlib.contextmanager
def annoyed(path: str, dice: random.Random):
    """Nuisances beside the block."""
    argv = [sys.executable, "-u", str(NUISANCE)]
    nuisances = [
        subprocess.Popen([*argv, path, str(dice.random())], stdin=subprocess.DEVNULL, start_new_session=True),
        subprocess.Popen([*argv, "listen"], stdin=subprocess.DEVNULL, start_new_session=True),
    ]
    try:
        yield
    finally:
        for nuisance in nuisances:
            # With all that it has forked.
            os.killpg(nuisance.pid, signal.SIGKILL)
        for nuisance in nuisances:
            try:
                nuisance.wait(60)
            except subprocess.TimeoutExpired:
                raise Stuck("a client with bad habits does not end", rig.blocked_stacks()) from None
