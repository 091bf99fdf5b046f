# SPDX-License-Identifier: MIT OR Apache-2.0
"""Ordinary users against each other's devices and root's.

Alice, Bob and root have a disk each. Each round is something that one of the users does to a disk that is not theirs:
a command, an open of a node, a signal to a server. It must be refused in time, and the disk must serve its owner as
before.
"""

import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from support.blockio import Disk
from support.command import run
from support.face import NATIVE, device_id
from support.features import has
from support.pace import patience
from support.processes import blocked_stacks
from support.waiting import until
from tools import content
from tools.findings import Findings

RULES = Path(__file__).resolve().parents[3] / "udev" / "60-ublk.rules"
INSTALLED = Path("/etc/udev/rules.d/60-ublk.rules")
CONTROL = "/dev/ublk-control"
ALICE, BOB, ROOT = 1000, 1001, 0
NAMES = {ALICE: "alice", BOB: "bob", ROOT: "root"}
LIMIT = 60.0
MARK = content.sectors(9, 0, 8, 1)

# What one user does to another's disk. PATH, ID, CHAR and PID stand for the disk's own.
ATTEMPTS: dict[str, list[str]] = {
    "del": ["ublk", "del", "-n", "ID"],
    "del_force": ["ublk", "del", "--force", "-n", "ID"],
    "del_async": ["ublk", "del", "--async", "-n", "ID"],
    "quiesce": ["ublk", "quiesce", "-n", "ID"],
    "upgrade": ["ublk", "upgrade", "-n", "ID"],
    "recover": ["ublk", "recover", "-n", "ID"],
    "resize": ["ublk", "resize", "-n", "ID", "-s", "8M"],
    "add_same_number": ["ublk", "add", "-t", "null", "--size", "8M", "-n", "ID"],
    "read": ["dd", "if=PATH", "of=/dev/null", "bs=4096", "count=1"],
    "write": ["dd", "if=/dev/zero", "of=PATH", "bs=4096", "count=1", "conv=notrunc"],
    "open_char_device": ["sh", "-c", "exec 3<>CHAR"],
    "stand_on_it": ["ublk", "add", "-t", "file", "-f", "PATH"],
    "kill_server": ["kill", "-9", "PID"],
    "stop_server": ["kill", "-STOP", "PID"],
    "read_server_memory": ["dd", "if=/proc/PID/mem", "of=/dev/null", "bs=1", "count=1"],
    "read_partitions": ["blockdev", "--rereadpt", "PATH"],
}
# What may be done by anyone, and touches only one's own.
HARMLESS: dict[str, list[str]] = {
    "list": ["ublk", "list"],
    "del_all": ["ublk", "del", "-a"],
    "del_all_force": ["ublk", "del", "-a", "--force"],
    "del_dead": ["ublk", "del", "--dead"],
    "stat": ["ublk", "stat", "-n", "ID"],
}


def campaign(findings: Findings, rounds: int, only: Iterable[str], plant: str) -> None:
    if not has("UNPRIVILEGED_DEV"):
        findings.say("this driver has no users' devices")
        return
    names = [name for name in [*ATTEMPTS, *HARMLESS] if name in set(only) or not set(only)]
    dice = random.Random(f"{findings.seed}/users")
    with rules():
        disks: dict[int, str] = {}
        try:
            for number in range(rounds):
                if findings.time_is_over():
                    break
                findings.round = number
                for owner in (ALICE, BOB, ROOT):
                    if owner not in disks:
                        disks[owner] = make(owner)
                attacker = dice.choice((ALICE, BOB))
                victim = dice.choice([uid for uid in disks if uid != attacker])
                attempt(findings, dice.choice(names), attacker, victim, disks, plant)
                findings.count(attempts=1)
        finally:
            run(["ublk", "del", "-a", "--force"], check=False, timeout=90)


@contextlib.contextmanager
def rules() -> Iterator[None]:
    """The udev rules as they are shipped, but for the program's place."""
    before = os.stat(CONTROL).st_mode & 0o777
    INSTALLED.parent.mkdir(parents=True, exist_ok=True)
    INSTALLED.write_text(RULES.read_text().replace("/usr/bin/ublk", shutil.which("ublk") or ""))
    run(["udevadm", "control", "--reload"])
    run(["udevadm", "trigger", "--settle", CONTROL])
    try:
        yield
    finally:
        INSTALLED.unlink()
        run(["udevadm", "control", "--reload"])
        os.chmod(CONTROL, before)


def user(uid: int) -> dict[str, Any]:
    """How a program is started for a user."""
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    more = {} if uid == ROOT else {"user": uid, "group": uid, "extra_groups": []}
    return {"cwd": "/", "env": environment | {"HOME": "/"}, **more}


def make(owner: int) -> str:
    """A disk of a user, with a mark."""
    path = run(["ublk", "add", "-t", "mem", "--size", "16M"], timeout=60, **user(owner)).out.strip()
    until(lambda: os.stat(path).st_uid == owner, f"{path} is {NAMES[owner]}'s", 20)
    with Disk(path, direct=True) as disk:
        disk.write(0, MARK)
    return path


def attempt(findings: Findings, name: str, attacker: int, victim: int, disks: dict[int, str], plant: str) -> None:
    path = disks[victim]
    number = device_id(path)
    pid = NATIVE.info(path)["pid"]
    words = {"PATH": path, "ID": str(number), "CHAR": f"/dev/ublkc{number}", "PID": str(pid)}
    argv = []
    for word in ATTEMPTS.get(name) or HARMLESS[name]:
        for key, value in words.items():
            word = word.replace(key, value)
        argv.append(word)
    what = f"{NAMES[attacker]} against {NAMES[victim]}: {' '.join(argv)}"
    # The planted fault: the attacker is root.
    actor = user(ROOT if plant else attacker)
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **actor
    )
    try:
        said, _ = process.communicate(timeout=patience(LIMIT))
    except subprocess.TimeoutExpired:
        findings.add(f"users: {name} does not end", f"{what}\n{blocked_stacks()}")
        process.kill()
        process.communicate()
        said = b""
    if name in ATTEMPTS and process.returncode == 0:
        findings.add(f"users: {name} is not refused", f"{what}: {said.decode(errors='replace')[-300:]}")
    elif process.returncode and not said.strip():
        findings.add(f"users: {name} fails without a word", what)
    if name.startswith("del_all"):
        until(lambda: not os.path.exists(disks[attacker]), "the end of the attacker's own disk", 60)
        del disks[attacker]
    check(findings, name, what, victim, disks)


def check(findings: Findings, name: str, what: str, victim: int, disks: dict[int, str]) -> None:
    """The victim's disk is there, belongs to its owner and has its content."""
    path = disks[victim]
    try:
        found = os.stat(path)
        if (found.st_uid, found.st_mode & 0o077) != (victim, 0 if victim else found.st_mode & 0o077):
            findings.add(f"users: {name}: the node is not its owner's any more", f"{what}: {found}")
        with Disk(path, direct=True, read_only=True) as disk:
            if disk.read(0, len(MARK)) != MARK:
                findings.add(f"users: {name}: the content has changed", what)
    except OSError as error:
        findings.add(f"users: {name}: the disk of another is gone or does not answer", f"{what}: {error}")
        run(["ublk", "del", "--force", "-n", str(device_id(path))], check=False, timeout=90)
        del disks[victim]
