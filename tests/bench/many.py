# SPDX-License-Identifier: MIT OR Apache-2.0
"""Measures many devices at a time: their cost while idle, and the cost of a request when clients use all of them."""

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

COUNTS = [1, 10, 100, 1000]
QUICK = [1, 100]
# 32 requests in flight for any number of devices. One client cannot have the paths of a thousand.
CLIENTS = 4
JOB = {"rw": "randread", "bs": "4k", "iodepth": 8, "file_service_type": "random"}


class Devices:
    """Devices and the processes that serve them."""

    def __init__(self, paths, pids, seconds):
        self.paths = paths
        self.pids = sorted(set(pids))
        self.add_seconds = seconds

    def shares(self):
        """The devices of each client, separated by colons; all of them if there are few."""
        shares = [self.paths[client::CLIENTS] for client in range(CLIENTS)]
        return [":".join(share if len(self.paths) >= CLIENTS else self.paths) for share in shares]

    def _sum(self, name, pattern):
        found = (re.search(pattern, Path(f"/proc/{pid}/{name}").read_text(), re.M) for pid in self.pids)
        return sum(int(match[1]) for match in found)

    def _ticks(self):
        return sum(
            sum(map(int, Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13])) for pid in self.pids
        )

    def idle(self):
        """Measure the devices while they are idle."""
        # Memory that the kernel's first reads of each disk have touched is returned meanwhile.
        time.sleep(6)
        ticks = self._ticks()
        time.sleep(5)
        ticks = self._ticks() - ticks
        # Shared memory is divided among the processes.
        memory = self._sum("smaps_rollup", r"^Pss:\s+(\d+) kB")
        threads = self._sum("status", r"^Threads:\s+(\d+)")
        cpu = ticks / os.sysconf("SC_CLK_TCK") / 5
        return {"add_s": self.add_seconds, "memory_kib": memory, "threads": threads, "cpu": cpu}


@contextlib.contextmanager
def _ublk(count):
    """All devices in one process."""
    began = time.monotonic()
    argv = ["ublk", "add", "-t", "null", "-d", "64", "--size", "1G", "--count", str(count)]
    try:
        said = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
        seconds = time.monotonic() - began
        listed = json.loads(subprocess.run(["ublk", "list", "--json"], check=True, capture_output=True).stdout)
        yield Devices(said.split(), [device["pid"] for device in listed], seconds)
    finally:
        subprocess.run(["ublk", "del", "-a"], check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def _kublk(count):
    """Each in a process of its own: there is no other way."""
    began = time.monotonic()
    numbers, pids = [], []
    try:
        for _ in range(count):
            argv = ["kublk", "add", "-t", "null", "-q", "1", "-d", "64"]
            said = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
            numbers.append(re.search(r"dev id (\d+)", said)[1])
            pids.append(int(re.search(r"daemon pid (\d+)", said)[1]))
        yield Devices([f"/dev/ublkb{number}" for number in numbers], pids, time.monotonic() - began)
    finally:
        for number in numbers:
            subprocess.run(["kublk", "del", "-n", number], check=False, stdout=subprocess.DEVNULL)


# With so many devices at most: a thousand processes take ten minutes to begin, to be measured and to end.
PEERS = {"ublk": (_ublk, 1000), "kublk": (_kublk, 100)}


def measure(counts, work, with_idleness, results):
    """Adds a row to `results` by peer and number of devices. `work` measures a job on what it is given of devices."""
    # A client has all of its devices open.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for count in counts:
        for peer, (add, most) in PEERS.items():
            name = f"{peer}, {count} devices"
            if count > most or shutil.which(peer) is None:
                why = f"there is no {peer} here" if count <= most else f"measured with {most} at most"
                results.leave_out(name, why)
                continue
            try:
                with add(count) as devices:
                    subprocess.run(["udevadm", "settle", "--timeout=120"], check=False)
                    row = {"peer": peer, "count": count} | (devices.idle() if with_idleness else {})
                    row |= work(devices.shares(), JOB)
            except Exception as why:
                # Whatever else was measured is not to be lost.
                results.fail(name, why)
                continue
            results.add("many", row)
            print(f"{name}: {row}", file=sys.stderr, flush=True)
