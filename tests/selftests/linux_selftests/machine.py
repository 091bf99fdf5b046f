# SPDX-License-Identifier: MIT OR Apache-2.0
"""Virtual machines that run scripts: as many as it takes until each script has come to its end or its machine's."""

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .build import Selftests
from .observation import Observation

# From the start of vm/run, which may have to make the guest's disks, to the first script.
_START = 1800.0
# What the guest does around a script: measures kublk's delay, waits for what is left, removes it.
_AROUND = 300.0
_END = 60.0

_LAST_LINES = 15


class MachineError(Exception):
    """Scripts cannot be run at all."""


@dataclass(frozen=True)
class Options:
    """What machines are made of."""

    repository: Path
    selftests: Selftests
    kernel: str
    driver: str
    memory: str
    # Seconds per script.
    limit: float
    results: Path


@dataclass
class Tally:
    """How the machines did."""

    # How each of them ended: vm/run's exit status.
    statuses: list[int]
    # Machines that ended badly (the kernel's log has a fault, say) although no script shows why.
    unexplained: list[str]


class Machine:
    """One virtual machine and its conversation."""

    def __init__(self, options: Options, number: int, scripts: list[str]) -> None:
        self.results = options.results / f"machine-{number}"
        self.results.mkdir(parents=True, exist_ok=True)
        self._limit = options.limit + _AROUND
        self._lines: queue.Queue[str | None] = queue.Queue()
        path = "PYTHONPATH=/opt/ublk/tests/selftests:/opt/ublk/tests/e2e"
        seconds = min(int(_START + len(scripts) * self._limit), 604_800)
        command = [str(options.repository / "vm/run"), "--kernel", options.kernel, "--driver", options.driver]
        command += ["--memory", options.memory, "--timeout", str(seconds)]
        command += ["--extra", str(options.selftests.directory), "--results", str(self.results), "--env", path]
        if number > 1:
            # What was built for the first machine does for the others.
            command.append("--no-build")
        command += ["--", "python3", "-m", "linux_selftests.guest", str(options.limit), *scripts]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        assert self._process.stdout
        assert self._process.stderr
        self._log = self.results / "vm-run.log"
        self._threads = [
            threading.Thread(target=self._take, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._pass_on, args=(self._process.stderr,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _take(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put(line)
        self._lines.put(None)

    def _pass_on(self, stream: IO[str]) -> None:
        with open(self._log, "w") as log:
            for line in stream:
                log.write(line)
                log.flush()
                sys.stderr.write(line)

    def converse(self, on_begin: Callable[[str], None], on_end: Callable[[Observation], None]) -> str:
        """Passes the guest's events on until it ends; what was begun and not ended is reported with the machine's end.
        Returns why the machine stopped before its last script, if it says so."""
        running, unfit, late = "", "", ""
        wait = _START
        while True:
            try:
                line = self._lines.get(timeout=wait)
            except queue.Empty:
                late = f"the machine said nothing for {wait:.0f} s"
                self._process.terminate()
                break
            if line is None:
                break
            try:
                event = json.loads(line)
            except ValueError:
                sys.stderr.write(f"(guest) {line}")
                continue
            wait = self._limit
            match event["event"]:
                case "begin":
                    running = event["script"]
                    on_begin(running)
                case "end":
                    running = ""
                    on_end(Observation.from_event(event))
                case "unfit":
                    unfit = event["reason"]
        self.status = self._wait()
        if running:
            on_end(Observation(running, machine=late or f"it ended in the middle: {self.how_it_ended()}"))
        return unfit

    def _wait(self) -> int:
        try:
            status = self._process.wait(_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        for thread in self._threads:
            thread.join(_END)
        return status

    def how_it_ended(self) -> str:
        """The status of vm/run with its last words."""
        said = self._log.read_text().split("\n")
        last = [line for line in said if line.strip()][-1:]
        return f"vm/run ends with {self.status}" + (f" ({last[0].removeprefix('vm: ')})" if last else "")

    def close(self) -> None:
        """Ends the machine, wherever it is."""
        if self._process.poll() is None:
            self._process.terminate()
            self._wait()

    def last_lines(self) -> str:
        return "\n".join(self._log.read_text().splitlines()[-_LAST_LINES:])


def run(
    options: Options,
    scripts: list[str],
    on_begin: Callable[[str], None],
    on_end: Callable[[Observation], None],
    note: Callable[[str], None],
) -> Tally:
    """Runs the scripts in order. A script that takes its machine with it costs the others only a new machine."""
    tally = Tally([], [])
    pending = list(scripts)
    troubled = False

    def ended(seen: Observation) -> None:
        nonlocal troubled
        pending.remove(seen.script)
        troubled = troubled or bool(seen.kernel_trouble or seen.machine)
        on_end(seen)

    while pending:
        number = len(tally.statuses) + 1
        before, troubled = len(pending), False
        machine = Machine(options, number, pending)
        try:
            unfit = machine.converse(on_begin, ended)
        finally:
            machine.close()
        tally.statuses.append(machine.status)
        if len(pending) == before:
            raise MachineError(f"vm/run ends with {machine.status} before the first script:\n{machine.last_lines()}")
        if machine.status != 0 and not troubled:
            tally.unexplained.append(f"machine {number}: {machine.how_it_ended()}, outside of any script")
        if pending:
            note(f"{unfit or 'the machine is gone'}: going on with a new machine")
    return tally
