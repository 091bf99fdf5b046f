# SPDX-License-Identifier: MIT OR Apache-2.0
"""The disk below ours, in a process of its own (`lower.py`)."""

import contextlib
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

from support import udev
from support.server import Child

from .power_log import Entry, PowerLog

PROGRAM = Path(__file__).resolve().parent.parent / "lower.py"


class Store(Child):
    """A disk with a volatile cache and a log."""

    def __init__(self, size: int, *, block_size: int = 512, slow: int = 0, seed: int = 0) -> None:
        wanted = {"size": size, "block_size": block_size, "slow": slow, "seed": seed}
        since = udev.now()
        super().__init__([sys.executable, "-u", str(PROGRAM), json.dumps(wanted)])
        self.size = size
        try:
            self.path: str = json.loads(self.line(60))
            udev.wait_until_seen(self.path, since)
        except BaseException:
            self.close()
            raise

    def _ask(self, **question: Any) -> Any:
        self.say(json.dumps(question))
        return json.loads(self.line(120))

    def take_log(self) -> PowerLog:
        """The log since the last call, or since the disk was made."""
        path = f"/tmp/power-log-{self.pid}"
        self._ask(log=path)
        with open(path, "rb") as file:
            base, entries = pickle.load(file)
        os.unlink(path)
        return PowerLog(base, [Entry(*entry) for entry in entries])

    def fail(self, kind: str | None) -> None:
        """Lets requests of a kind fail, or none."""
        self._ask(fail=kind)

    def stop(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        status = self.wait(60)
        assert status == 0, f"the disk below ended with status {status}; its log:\n{self.log}"

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.stop()
        finally:
            self.close()
