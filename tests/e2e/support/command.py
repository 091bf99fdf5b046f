# SPDX-License-Identifier: MIT OR Apache-2.0
"""Running programs, always with an end."""

import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .pace import patience

NOBODY = {"user": "nobody", "group": "nogroup", "extra_groups": []}


@dataclass(frozen=True)
class Result:
    """How a program ended."""

    argv: tuple[str, ...]
    status: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"{shlex.join(self.argv)}: status {self.status}\nstdout: {_short(self.out)}\nstderr: {_short(self.err)}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 2000 else f"{text[:1000]} ... {text[-1000:]}")


def run(
    argv: Sequence[str | os.PathLike],
    *,
    input: str | None = None,
    timeout: float = 30.0,
    check: bool = True,
    **options: Any,
) -> Result:
    """Runs a program to its end. A daemon that keeps the pipes open counts as not ended."""
    words = tuple(map(os.fspath, argv))
    timeout = patience(timeout)
    with subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        **options,
    ) as process:
        try:
            out, err = process.communicate(input, timeout=timeout)
        except subprocess.TimeoutExpired:
            state = "has ended but left its output open" if process.poll() is not None else "still runs"
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            # Another holder of the pipes must not hold up this.
            process.stdout.close()
            process.stderr.close()
            raise AssertionError(f"{shlex.join(words)}: {state} after {timeout:g} s") from None
    result = Result(words, process.returncode, out, err)
    if check:
        assert result.status == 0, str(result)
    return result
