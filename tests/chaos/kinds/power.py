# SPDX-License-Identifier: MIT OR Apache-2.0
"""Power cuts: what a flush or a durable write acknowledged must be on the store, whatever else is lost.

A disk of ours stands on a store with a volatile cache that keeps a log (`lower.py`). Clients on every queue write,
flush and write with FUA; in some recordings servers are killed and replaced meanwhile, under load or while there is
nothing to do. Then the power is cut at many places of the log, mostly at the moment of an acknowledgement: each is a
round. Where the disk is the store, sector by sector, its content after the cut is looked at directly, and also after
each acknowledgement, for what that made durable, with all lost that was in the store's cache. Where there is a file
system between, it is mounted and the disk is served again.
"""

import random
import time
from collections.abc import Iterable
from pathlib import Path

from support.blockio import Disk
from support.command import run
from support.features import has
from support.waiting import until
from tools import rig
from tools.findings import Findings, Stuck
from tools.history import Extent, History, Wrong
from tools.load import Client, ZoneClient, lay_out, lay_out_zones
from tools.power_log import MODES, NOTHING, PowerLog
from tools.store import Store

SIZE = 24 << 20
# A file system needs room for itself.
FILE_SIZE = 8 << 20
CLIENTS = 4
CUTS = 12
# Of a disk in a file system; each takes seconds.
MOUNTED_CUTS = 3
# Seconds for a part of a recording, however few requests have ended.
LONGEST = 30.0


def campaign(findings: Findings, rounds: int, only: Iterable[str], plant: str) -> None:
    wanted = [kind for kind in rig.KINDS.values() if kind.available() and (not only or kind.name in only)]
    wanted = [rig.PLANTED[plant]] if plant else wanted
    done = recording = 0
    while done < rounds and not findings.time_is_over():
        kind = wanted[recording % len(wanted)]
        cuts = min(MOUNTED_CUTS if kind.mounted else CUTS, rounds - done)
        dice = random.Random(f"{findings.seed}/power/{recording}")
        made = Recording(findings, kind, dice, recording, done, cuts, plant)
        try:
            made.make()
        except (AssertionError, OSError) as error:
            findings.add(f"{kind.name}: a recording does not come to its end", f"{made}: {error}")
            rig.clear()
        done += cuts
        recording += 1


class Recording:
    """A store, a disk on it, a load, and the cuts that are made of its log."""

    def __init__(
        self, findings: Findings, kind: rig.Kind, dice: random.Random, number: int, first: int, cuts: int, plant: str
    ) -> None:
        self._findings = findings
        self._kind = kind
        self._dice = dice
        self._number = number
        self._first = first
        self._cuts = cuts
        self.queues = dice.choice((1, 2, 2))
        # What happens to the server meanwhile.
        changes = ["none", "none", "kill"] + (["upgrade"] if has("QUIESCE") and not kind.python else [])
        self.change = dice.choice(changes)
        if plant:
            self.change, self.queues = ("kill" if plant == "ForgetsAtRecovery" else "none"), 2
        self.history = History(number + 1, [])

    def __str__(self) -> str:
        return f"recording {self._number} ({self._kind.name}, {self.queues} queues, server: {self.change})"

    def make(self) -> None:
        self._findings.round = self._first
        with Store(SIZE, seed=self._dice.randrange(1 << 30)) as store:
            if self._kind.mounted:
                log = self._record_mounted(store)
            else:
                log, _ = self._record(store, store.path, SIZE)
        self._cut(log)

    def _record_mounted(self, store: Store) -> PowerLog:
        run(["mkfs.ext4", "-q", store.path], timeout=60)
        with rig.mounted(store.path, "/mnt/chaos") as place:
            image = place / "disk"
            if not self._kind.zoned:
                with image.open("wb") as file:
                    file.truncate(FILE_SIZE)
            run(["sync"], timeout=60)
            log, upper = self._record(store, str(image), FILE_SIZE)
        assert upper
        return log

    def _record(self, store: Store, backing: str, size: int) -> tuple[PowerLog, rig.Upper]:
        recovery = "" if self.change == "none" else self._dice.choice(("reissue", "queue"))
        upper = rig.add(self._kind, backing, self._dice, queues=self.queues, recovery=recovery)
        clients = self._zone_clients(upper) if self._kind.zoned else self._clients(upper, size, recovery)
        try:
            for client in clients:
                client.start()
            for _ in range(1 if self.change == "none" else 3):
                self._let_work(clients, self._dice.randrange(50, 200))
                if self.change != "none":
                    self._change_server(upper, clients)
            self._stop(clients)
            # What follows is not of the recording: regular ends flush.
            log = store.take_log()
            self._judge_clients(clients, recovery)
            upper.remove()
        finally:
            for client in clients:
                client.stop()
            upper.close()
        return log, upper

    def _clients(self, upper: rig.Upper, size: int, recovery: str) -> list[Client]:
        parts = lay_out(self._dice, size, CLIENTS, self._block(upper.path))
        self.history = History(self._number + 1, [extent for part in parts for extent in part])
        return [self._client(upper, part, index, recovery) for index, part in enumerate(parts)]

    def _change_server(self, upper: rig.Upper, clients: list[Client]) -> None:
        # The next server's first request is then a flush of what its predecessor wrote.
        resting = clients if self._dice.random() < 0.5 else []
        for client in resting:
            client.rest()
        for client in resting:
            until(lambda client=client: client.resting, "a client rests", rig.NOTICE)
        if self.change == "kill":
            upper.kill()
            upper.recover()
        else:
            upper.upgrade()
        for client in resting:
            client.resume()

    def _zone_clients(self, upper: rig.Upper) -> list[Client]:
        parts = lay_out_zones(rig.ZONED_SIZE, rig.ZONE, 32768, CLIENTS)
        chunks = [chunk for part in parts for zone in part for chunk in zone]
        self.history = History(self._number + 1, chunks)
        seed = f"{self._findings.seed}/power/{self._number}"
        return [
            ZoneClient(upper.path, self.history, part, f"{seed}/{index}", cpu=index) for index, part in enumerate(parts)
        ]

    def _block(self, path: str) -> int:
        return int(Path("/sys/block", path.removeprefix("/dev/"), "queue/logical_block_size").read_text())

    def _client(self, upper: rig.Upper, part: list[Extent], index: int, recovery: str) -> Client:
        direct = index != 3 or not self._kind.cached
        seed = f"{self._findings.seed}/power/{self._number}/{index}"
        zeros = self._dice.random() < 0.3
        cached = self._kind.cached
        return Client(
            upper.path,
            self.history,
            part,
            seed,
            cpu=index,
            direct=direct,
            cached=cached,
            zeros=zeros,
            pages_may_be_lost=recovery == "queue",
        )

    def _let_work(self, clients: list[Client], requests: int) -> None:
        """Waits until so many requests more have ended, or some time if none end."""
        before = sum(client.counts.all() for client in clients)
        deadline = time.monotonic() + LONGEST
        while sum(client.counts.all() for client in clients) < before + requests and time.monotonic() < deadline:
            time.sleep(0.01)

    def _stop(self, clients: list[Client]) -> None:
        for client in clients:
            client.stop()
        for client in clients:
            client.join(rig.NOTICE)
            if client.is_alive():
                raise Stuck(f"{self}: a client does not get on", rig.blocked_stacks())

    def _judge_clients(self, clients: list[Client], recovery: str) -> None:
        self._report([wrong for client in clients for wrong in client.wrong], "while the disk was in use")
        for client in clients:
            if client.errors and recovery != "queue":
                self._findings.add(f"{self._kind.name}: a request fails for no reason", f"{self}: {client.errors[0]}")
        self._findings.count(
            recordings=1,
            writes=sum(client.counts.writes for client in clients),
            durable=sum(client.counts.durable for client in clients),
            flushes=sum(client.counts.flushes for client in clients),
        )

    def _report(self, found: list[Wrong], when: str) -> None:
        for kind in sorted({wrong.kind for wrong in found}):
            of_kind = [wrong for wrong in found if wrong.kind == kind]
            what = f"{self._kind.name}, server: {self.change}: {kind} {when}"
            self._findings.add(what, f"{self}: {of_kind[0]}; {len(of_kind)} sectors")

    def _cut(self, log: PowerLog) -> None:
        moments = self.history.moments()
        begun = [write.began for extent in self.history.extents for write in extent.writes]
        if not moments or not begun:
            self._findings.add(f"{self._kind.name}: clients get nowhere", str(self))
            return
        first, last = min(begun), max(*moments, *begun)
        times = [
            self._dice.choice(moments) if self._dice.random() < 0.75 else self._dice.randint(first, last)
            for _ in range(self._cuts)
        ]
        acknowledgements = [] if self._kind.mounted else moments
        cuts = sorted([(time, "") for time in acknowledgements] + [(time, self._dice.choice(MODES)) for time in times])
        made = 0
        for cut, mode in cuts:
            image = log.cut(cut, self._dice, mode or NOTHING)
            if not mode:
                self._report(self.history.check_new(cut, image.read), "after a power cut")
                continue
            self._findings.round = self._first + made
            made += 1
            if self._kind.mounted:
                image.write_to("/tmp/cut.img")
                self._look_through_disk(cut)
            else:
                self._report(self.history.check_all(cut, image.read), "after a power cut")
        self._findings.count(cuts=made, acknowledgements=len(acknowledgements))
        self._findings.say(f"{self}: {self._cuts} cuts, findings so far: {sum(self._findings.counts.values())}")

    def _look_through_disk(self, cut: int) -> None:
        with rig.loop_of("/tmp/cut.img") as loop, rig.mounted(loop, "/mnt/cut") as place:
            upper = rig.add(self._kind, str(place / "disk"), self._dice, queues=1)
            try:
                with Disk(upper.path, direct=True, read_only=True) as disk:
                    found = []
                    for extent in self.history.extents:
                        found += self._look(disk, extent, cut)
                self._report(found, "after a power cut")
            finally:
                upper.remove()
                upper.close()

    def _look(self, disk: Disk, extent: Extent, cut: int) -> list[Wrong]:
        try:
            data = disk.read(extent.offset, extent.length)
        except OSError as error:
            least, possible = self.history.possible(extent, cut)
            # Data and metadata of a block whose write was not durable may not belong together.
            if len(possible) > 1:
                self._findings.count(unreadable=1)
                return []
            held = f"what cannot be read ({error})"
            return [Wrong("a block with no write under way cannot be read", extent.first, held, least, least)]
        return self.history.check(extent, cut, data)
