# SPDX-License-Identifier: MIT OR Apache-2.0
"""Python handlers that go wrong in every way of the catalogue (`catalogue`).

Each round is a case in one style of handlers, for one operation. The client must get an errno or, where the case allows
it, the right answer, and never wrong bytes; it must get it in time, except from handlers that block. Other blocks
are right before and after. SIGTERM must end the server, and nothing of the device may be left.
"""

import errno
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import catalogue
from catalogue import ENDS, ERROR, LIVES, PULL, RIGHT, Case
from misbehaving import LENGTH, RUN, WRONG, bytes_of
from support import udev
from support.face import NATIVE, device_id
from support.pace import patience
from support.processes import blocked_stacks, is_running
from support.server import Child
from tools import content, rig
from tools.findings import Findings, Stuck
from tools.one_request import OneRequest

PROGRAM = Path(__file__).resolve().parent.parent / "misbehaving.py"
GOOD = 1 << 20
# How long a request of a handler that does not block may take.
ANSWER = 30.0
# How long a server may take to end after SIGTERM, handlers that block included.
END = 75.0
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS)
RAISED = ("raises_KeyboardInterrupt", "raises_SystemExit")
MEANT_TO_CRASH = ("aborts", "reads_address_zero", "sends_itself_SIGBUS")


def campaign(
    findings: Findings, rounds: int, only: Iterable[str], plant: str, back_end: type["BackEnd"] | None = None
) -> None:
    chosen = [catalogue.PLANTED[plant]] if plant else list(catalogue.CASES.values())
    only = list(only)
    todo = [
        (case, style, operation)
        for case in chosen
        for style in case.styles
        for operation in case.operations
        if (not only or case.name in only) and not (back_end is StandIn and case.needs_kernel)
    ]
    # In an order of the seed's, but every case once before any comes again in another style.
    random.Random(f"{findings.seed}/handlers").shuffle(todo)
    seen: Counter[str] = Counter()
    turns = []
    for trial in todo:
        turns.append((seen[trial[0].name], trial))
        seen[trial[0].name] += 1
    turns.sort(key=lambda turn: turn[0])
    for number, (_, (case, style, operation)) in enumerate(turns[:rounds]):
        if findings.time_is_over():
            break
        findings.round = number
        Trial(findings, case, style, operation, plant or case.name, back_end or Kernel).run()
        findings.count(cases=1)


class BackEnd:
    """What a case's disk is served with, and how requests get to it."""

    name = ""
    # A sector of a read that a handler has left unwritten.
    unwritten = content.ZEROS

    def __init__(self, server: Child, path: str) -> None:
        self.server = server
        self.path = path

    def request(self, operation: str, offset: int):
        """Sends a request; what it returns has a method `answer`."""
        raise NotImplementedError

    def is_there(self) -> bool:
        """Whether the device is there."""
        raise NotImplementedError


class Kernel(BackEnd):
    """The kernel's driver and a client in a process of its own."""

    name = "kernel"

    def __init__(self, server: Child, path: str) -> None:
        super().__init__(server, path)
        udev.wait_until_seen(path, udev.now() - 60)

    def request(self, operation: str, offset: int) -> OneRequest:
        return OneRequest(operation, self.path, offset, LENGTH)

    def is_there(self) -> bool:
        return os.path.exists(f"/dev/ublkc{device_id(self.path)}")


class StandIn(BackEnd):
    """The stand-in driver, whose client is a thread of the server: without a kernel."""

    name = "stand-in"
    unwritten = b"\xa5" * 512

    def request(self, operation: str, offset: int) -> "StandIn":
        self.server.say(json.dumps({"operation": operation, "offset": offset}))
        return self

    def answer(self, seconds: float) -> tuple[int, bytes] | None:
        try:
            number, data = json.loads(self.server.line(seconds))
        except AssertionError:
            # A process that ends takes the stand-in and its requests with it.
            return (errno.EIO, b"") if self.server.process.poll() is not None else None
        return number, bytes.fromhex(data)

    def is_there(self) -> bool:
        return False


class Trial:
    """One case, with a server and a client of its own."""

    def __init__(
        self, findings: Findings, case: Case, style: str, operation: str, name: str, back_end: type[BackEnd]
    ) -> None:
        self._findings = findings
        self._case = case
        self._style = style
        self._operation = operation
        self._name = name
        self._back_end = back_end

    def __str__(self) -> str:
        return f"{self._case.name}, {self._style}, {self._operation}"

    def run(self) -> None:
        argv = [sys.executable, "-u", str(PROGRAM), self._name, self._style, self._back_end.name]
        with Child(argv) as server:
            self._server = server
            self._disk = self._back_end(server, json.loads(server.line(60)))
            server.say("arm")
            assert json.loads(server.line(60)) == "armed"
            self._check_others("before")
            request = self._ask()
            lived = self._is_served()
            if lived:
                self._check_others("after")
            elif self._case.server == LIVES:
                self._add("the server is gone", server.log[-400:])
            # Threads that pull are the program's own: an exception ends them and nothing else.
            if self._case.server == ENDS and lived and not (self._style == PULL and self._case.name in RAISED):
                self._add("the server goes on", "")
            self._end(request)
        self._findings.say(f"{self}: done")

    def _add(self, what: str, detail: object) -> None:
        self._findings.add(f"handlers: {what}", f"{self}: {detail}")

    def _is_served(self) -> bool:
        """Whether the server is there, some time after the answer in which it may end."""
        if self._case.server == LIVES:
            return self._server.process.poll() is None
        deadline = time.monotonic() + patience(30 if self._case.server == ENDS else 3)
        while self._server.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return self._server.process.poll() is None

    def _check_others(self, when: str) -> None:
        if self._case.blocks and when == "after":
            return
        number, data = self._disk.request("read", GOOD).answer(ANSWER) or (-1, b"")
        if number != 0:
            # It may be about to end.
            if self._case.server == LIVES or when == "before":
                self._add(f"another block cannot be read {when}", os.strerror(number) if number > 0 else "no answer")
        elif data != bytes_of(GOOD, LENGTH):
            self._add("another block has wrong bytes", content.describe(data))

    def _ask(self) -> OneRequest | StandIn | None:
        """Sends the request; it is returned if it has no answer yet."""
        request = self._disk.request(self._operation, WRONG)
        answer = request.answer(2 if self._case.blocks else ANSWER)
        if answer is None:
            if not self._case.blocks:
                self._add("a request is not answered", f"{blocked_stacks()}; {self._server.log[-400:]}")
            return request
        self._judge(*answer)
        return None

    def _judge(self, number: int, data: bytes) -> None:
        if number:
            if self._case.client == RIGHT:
                self._add("a request fails that was answered right", os.strerror(number))
            return
        if self._case.client == ERROR:
            self._add("a failure is acknowledged as success", "")
        if self._operation == "read" and len(data) == LENGTH and data != bytes_of(WRONG, LENGTH):
            self._judge_bytes(data)

    def _judge_bytes(self, data: bytes) -> None:
        """Says whose bytes an answer has. What a handler leaves unwritten may be cleared, and has nothing of others."""
        for index in range(LENGTH // 512):
            part, number = data[index * 512 : (index + 1) * 512], WRONG // 512 + index
            if content.version_of(RUN, number, part) == 1:
                continue
            if part != self._disk.unwritten or "fills" not in self._case.name:
                self._add("a read is answered with bytes that are not the disk's", content.describe(part))
                return

    def _end(self, request: OneRequest | StandIn | None) -> None:
        began = time.monotonic()
        if self._server.process.poll() is None:
            self._server.signal(signal.SIGTERM)
        while is_running(self._server.pid) and time.monotonic() < began + patience(END):
            time.sleep(0.02)
        if is_running(self._server.pid):
            self._add(f"a server does not end within {END:g} s of SIGTERM", self._server.log[-400:])
            self._server.signal(signal.SIGKILL)
            rig.wait_for_end(self._server.pid)
        self._findings.count(slow_ends=int(time.monotonic() - began > 20))
        status = self._server.process.wait(20)
        if status in CRASHES and self._case.name not in MEANT_TO_CRASH:
            self._add(f"a server ends with signal {-status}", self._server.log[-800:])
        self._clear(status)
        if request is not None:
            answer = request.answer(60)
            if answer is None:
                raise Stuck(f"{self}: a client has no answer when the server is gone", blocked_stacks())
            self._judge(*answer)

    def _clear(self, status: int) -> None:
        """The device must be gone, or be removed where its server could not do so."""
        deadline = time.monotonic() + patience(30)
        while self._disk.is_there() and time.monotonic() < deadline:
            time.sleep(0.05)
            if status < 0 or self._case.server != LIVES:
                NATIVE.run("del", "--dead", timeout=60, check=False)
        if self._disk.is_there():
            self._add("a device is left behind", f"status {status}; {self._server.log[-400:]}")
            NATIVE.run("del", "--force", "-n", str(device_id(self._disk.path)), timeout=90, check=False)
