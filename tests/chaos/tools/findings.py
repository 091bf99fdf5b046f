# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a campaign found."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

# Each kind of finding is printed so often.
SHOWN = 3


class Stuck(Exception):
    """Something that does not end, with the stacks of blocked tasks. The machine cannot be used any more."""

    def __init__(self, what: str, stacks: str) -> None:
        super().__init__(what)
        self.stacks = stacks

    def name(self) -> str:
        """The fault, as far as the stacks name it."""
        if "blkdev_release" in self.stacks or "bdev_release" in self.stacks:
            return "a task waits in the release of a disk, for a server or in it"
        if "ublk_" in self.stacks:
            return "a task waits in the driver"
        return "a process does not end"


class Findings:
    """All that was wrong, grouped by what it was, with the round in which it was seen."""

    def __init__(self, kind: str, seed: int, results: Path, seconds: float = float("inf")) -> None:
        self.kind = kind
        self.seed = seed
        self.counts: dict[str, int] = {}
        self.figures: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}
        self._results = results
        self._began = time.monotonic()
        self._seconds = seconds
        self.round = -1

    def __bool__(self) -> bool:
        return bool(self.counts)

    def time_is_over(self) -> bool:
        """Whether no further round should begin."""
        return time.monotonic() - self._began >= self._seconds

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:7.1f}] {self.kind}: {text}", flush=True)

    def add(self, what: str, detail: object = "") -> None:
        """Notes something that is wrong."""
        self.counts[what] = self.counts.get(what, 0) + 1
        if self.counts[what] <= SHOWN:
            text = f"seed {self.seed} round {self.round}: {detail}"
            self._examples.setdefault(what, []).append(text)
            self.say(f"FINDING: {what}: {text}")
        self.save()

    def count(self, **figures: int) -> None:
        """Adds to what was done."""
        for name, figure in figures.items():
            self.figures[name] = self.figures.get(name, 0) + figure

    def save(self, more: Mapping[str, object] | None = None) -> None:
        document = {"kind": self.kind, "seed": self.seed, "rounds": self.round + 1, "done": self.figures}
        document |= {"findings": self.counts, "examples": self._examples} | dict(more or {})
        if self._results.is_dir():
            (self._results / f"{self.kind}.json").write_text(json.dumps(document, indent=1))

    def conclude(self) -> int:
        """Prints the sums; the exit status."""
        self.save({"seconds": round(time.monotonic() - self._began)})
        done = ", ".join(f"{figure} {name}" for name, figure in self.figures.items())
        self.say(f"{self.round + 1} rounds, seed {self.seed}: {done}")
        for what, count in self.counts.items():
            self.say(f"{count} x {what}")
        self.say("nothing found" if not self.counts else "FAILED")
        sys.stdout.flush()
        return 1 if self.counts else 0
