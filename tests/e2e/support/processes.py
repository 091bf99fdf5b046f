# SPDX-License-Identifier: MIT OR Apache-2.0
"""The processes of the machine, seen through /proc."""

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

KTHREADD = 2


@dataclass(frozen=True)
class Process:
    """A user process. The start time distinguishes it from a later one with the same id."""

    pid: int
    start: int
    parent: int
    name: str

    def __str__(self) -> str:
        try:
            line = Path(f"/proc/{self.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            line = ""
        return f"{self.pid} ({line.strip() or self.name})"


def _fields(path: str) -> tuple[str, list[str]] | None:
    try:
        text = Path(path).read_text(errors="replace")
    except OSError:
        return None
    name, rest = text[text.index("(") + 1 :].rsplit(")", 1)
    return name, rest.split()


def has_living_task(pid: int) -> bool:
    """Whether any thread is more than a zombie: the first one may be dead while others run."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return False
    for task in tasks:
        fields = _fields(f"/proc/{pid}/task/{task}/stat")
        if fields and fields[1][0] not in "ZX":
            return True
    return False


def is_running(pid: int) -> bool:
    """Whether a process with this id is alive."""
    return has_living_task(pid)


def user_processes() -> set[Process]:
    """All living processes but the kernel's threads and udev's workers, which come and go."""
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        fields = _fields(f"/proc/{entry}/stat")
        if fields is None:
            continue
        name, rest = fields
        found[int(entry)] = Process(int(entry), int(rest[19]), int(rest[1]), name)
    udev = {pid for pid, process in found.items() if "udev" in process.name}
    return {
        process
        for pid, process in found.items()
        if pid != KTHREADD
        and process.parent != KTHREADD
        and pid not in udev
        and process.parent not in udev
        and has_living_task(pid)
    }


def threads(pid: int) -> list[int]:
    """The ids of a process's threads."""
    return [int(task) for task in os.listdir(f"/proc/{pid}/task")]


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Sends a signal; a process that is gone already is fine."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def is_blocked(pid: int, task: int) -> bool:
    """Whether a thread is in an uninterruptible wait, such as for a request that the driver has."""
    fields = _fields(f"/proc/{pid}/task/{task}/stat")
    return fields is not None and fields[1][0] == "D"


def blocked_stacks() -> str:
    """Where in the kernel tasks are stuck, for the report of a test that takes too long."""
    lines = []
    for entry in sorted(filter(str.isdigit, os.listdir("/proc")), key=int):
        try:
            tasks = os.listdir(f"/proc/{entry}/task")
        except OSError:
            continue
        for task in tasks:
            fields = _fields(f"/proc/{entry}/task/{task}/stat")
            if fields is None or fields[1][0] != "D":
                continue
            try:
                stack = Path(f"/proc/{entry}/task/{task}/stack").read_text()
            except OSError as error:
                stack = f"({error})\n"
            lines.append(f"task {task} of {entry} ({fields[0]}):\n{stack}")
    return "".join(lines) or "no task is in an uninterruptible wait\n"


def kernel_stacks(pid: int) -> str:
    """The kernel stacks of a process."""
    found = []
    for task in threads(pid):
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/task/{task}/stack").read_text())
    return "".join(found)
