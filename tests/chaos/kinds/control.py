# SPDX-License-Identifier: MIT OR Apache-2.0
"""Control commands from several processes at random, over a few devices that all of them use.

Each round is a command: add, del, del --force, del --dead, quiesce, upgrade, recover, resize, list, stat, or the death
of a server. Each must end in time, with status 0, or 1 and a message (2 for what the command line refuses); no
message may be a traceback or a panic. `list` must be JSON. When all is done, everything can be deleted and
nothing is left.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from support.face import NATIVE, PYTHON, Face
from support.features import has
from support.pace import patience
from support.processes import blocked_stacks
from tools.findings import Findings, Stuck

WORKERS = 4
# Numbers that all of them use, so that they meet.
NUMBERS = range(4)
# Longest time for a command; some wait for requests or for the driver to notice a death.
LIMIT = 120.0
FILES = Path("/root/chaos")
NUISANCE = Path(__file__).resolve().parent.parent / "tools/nuisance.py"
CRASH = re.compile(r"Traceback \(most recent|panicked at|core dumped|Segmentation fault|RUST_BACKTRACE")


def campaign(findings: Findings, rounds: int, only: Iterable[str], plant: str) -> None:
    FILES.mkdir(exist_ok=True)
    for number in NUMBERS:
        with (FILES / f"{number}.img").open("wb") as file:
            file.truncate(16 << 20)
    dice = random.Random(f"{findings.seed}/control")
    workers = [
        Worker(findings, dice.random(), rounds // WORKERS + (index < rounds % WORKERS), set(only), plant, index)
        for index in range(WORKERS)
    ]
    argv = [sys.executable, "-u", str(NUISANCE)]
    nuisances = [
        subprocess.Popen([*argv, f"/dev/ublkb{number}", str(dice.random())], start_new_session=True)
        for number in NUMBERS[:2]
    ]
    nuisances.append(subprocess.Popen([*argv, "listen"], start_new_session=True))
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        time.sleep(0.2)
        findings.round = sum(worker.done for worker in workers) - 1
    for nuisance in nuisances:
        os.killpg(nuisance.pid, signal.SIGKILL)
    if stuck := next((worker.stuck for worker in workers if worker.stuck), None):
        raise stuck
    last = Worker(findings, 0, 0, set(), plant, 0)
    last.command(NATIVE, "del", "-a", "--force")
    last.command(NATIVE, "del", "--dead")
    # Not before: I/O on a disk that waits for a server holds its client, also a killed one.
    for nuisance in nuisances:
        try:
            nuisance.wait(patience(60))
        except subprocess.TimeoutExpired:
            raise Stuck("a client with bad habits does not end", blocked_stacks()) from None


def shown_processes() -> str:
    """The threads of our programs, and where each waits."""
    argv = ["ps", "-eLo", "pid,ppid,lwp,stat,time,wchan:24,args"]
    lines = subprocess.run(argv, capture_output=True, text=True, check=False).stdout.splitlines()
    return "\n".join(line[:160] for line in lines if "ublk" in line)


class Worker(threading.Thread):
    """Sends commands, one after the other."""

    def __init__(self, findings: Findings, seed: float, count: int, only: set[str], plant: str, index: int) -> None:
        super().__init__(daemon=True)
        self._findings = findings
        self._dice = random.Random(seed)
        self._count = count
        self._only = only
        self._plant = plant
        self._index = index
        self.done = 0
        self.stuck: Stuck | None = None

    def run(self) -> None:
        ways = {
            name.removeprefix("do_"): getattr(self, name)
            for name in sorted(dir(self))
            if name.startswith("do_") and (not self._only or name.removeprefix("do_") in self._only)
        }
        # Devices come more often than they go.
        names = [*ways, *(["add"] * 4 if "add" in ways else [])]
        try:
            for _ in range(self._count):
                if self._findings.time_is_over():
                    break
                name = self._dice.choice(names)
                ways[name]()
                self._findings.count(**{name: 1})
                self.done += 1
        except Stuck as stuck:
            self.stuck = stuck

    def _number(self) -> str:
        return str(self._dice.choice(NUMBERS))

    def _face(self) -> Face:
        return NATIVE if self._dice.random() < 0.8 else PYTHON

    def command(self, face: Face, *words: str) -> str:
        """Runs a command and judges how it ends; its output."""
        argv = list(face.argv) + list(words)
        if self._plant and self._dice.random() < 0.5:
            argv = {
                "hangs": ["sleep", "1000"],
                "says-nothing": ["false"],
                "crashes": ["sh", "-c", "echo Traceback '(most recent call last)' >&2; exit 1"],
            }[self._plant]
        limit = 5 if self._plant == "hangs" else patience(LIMIT)
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        shown = " ".join(words)
        try:
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            stacks = blocked_stacks()
            processes = shown_processes()
            process.kill()
            text = f"{shown}\n{stacks}\n{processes}"
            self._findings.add(f"control: {words[0]} does not end within {limit:g} s", text)
            try:
                process.communicate(timeout=patience(30))
            except subprocess.TimeoutExpired:
                raise Stuck(f"{shown}: cannot be killed", blocked_stacks()) from None
            return ""
        if process.returncode not in (0, 1, 2):
            self._findings.add(f"control: {words[0]} ends with status {process.returncode}", f"{shown}: {err[-500:]}")
        elif process.returncode and not err.strip():
            self._findings.add(f"control: {words[0]} fails without a word", shown)
        if CRASH.search(err):
            self._findings.add(f"control: {words[0]} crashes", f"{shown}: {err[-800:]}")
        self._findings.count(refused=int(process.returncode != 0))
        return out if process.returncode == 0 else ""

    def do_add(self) -> None:
        number = self._number()
        kind = self._dice.choice(("null", "mem", "file", "file"))
        words = ["-t", kind, "-n", number, "-q", str(self._dice.choice((1, 2)))]
        words += ["-f", str(FILES / f"{number}.img")] if kind == "file" else ["--size", "16M"]
        if self._dice.random() < 0.5:
            modes = ["queue", "reissue"] + (["fail-io"] if has("USER_RECOVERY_FAIL_IO") else [])
            words += ["--recovery", self._dice.choice(modes)]
        self.command(self._face(), "add", *words)

    def do_del(self) -> None:
        self.command(self._face(), "del", "-n", self._number())

    def do_del_force(self) -> None:
        self.command(self._face(), "del", "--force", "-n", self._number())

    def do_del_async(self) -> None:
        self.command(self._face(), "del", "--async", "-n", self._number())

    def do_del_dead(self) -> None:
        self.command(self._face(), "del", "--dead")

    def do_quiesce(self) -> None:
        self.command(self._face(), "quiesce", "-n", self._number())

    def do_upgrade(self) -> None:
        self.command(NATIVE, "upgrade", "-n", self._number())

    def do_recover(self) -> None:
        self.command(NATIVE, "recover", "-n", self._number())

    def do_resize(self) -> None:
        self.command(self._face(), "resize", "-n", self._number(), "-s", self._dice.choice(("8M", "16M", "24M")))

    def do_stat(self) -> None:
        self.command(self._face(), "stat", "--json", "-n", self._number())

    def do_list(self) -> None:
        out = self.command(self._face(), "list", "--json")
        if out:
            try:
                json.loads(out)
            except ValueError as error:
                self._findings.add("control: list is not JSON", f"{error}: {out[-300:]}")

    def do_kill(self) -> None:
        """The death of a server, by one signal or another."""
        try:
            devices = json.loads(self.command(NATIVE, "list", "--json") or "[]")
        except ValueError:
            return
        pids = [device["pid"] for device in devices if (device.get("pid") or 0) > 1]
        if pids:
            pid, number = self._dice.choice(pids), self._dice.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
            with contextlib.suppress(OSError):
                # It may have ended, and another process may have its number.
                if b"ublk" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, number)
