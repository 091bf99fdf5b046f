# SPDX-License-Identifier: MIT OR Apache-2.0
"""Serves disks of `disks.py` in a process of its own and answers expressions about them.

Argument: a JSON object with `disk` (the class), `args` (its keyword arguments), `start` (those of
`start`), `count` (how many of them), and `recover` (the number of a device to serve instead). Lines on
standard input are Python expressions over `disk`, `dev` (and the lists `disks`, `devs`); each gets one line
of JSON. The end of input stops everything; the line `exit` leaves that to the interpreter's own end.
"""

import dataclasses
import json
import logging
import os
import select
import signal
import sys
from collections.abc import Iterator
from typing import Any

import disks as classes

import ublk


def lines() -> Iterator[str]:
    """Standard input line by line, with signals heeded whenever they come.

    CPython runs a handler between two of its instructions. A signal that comes after the last one before a `read`
    has no effect until that returns, so nothing here waits in a `read`.
    """
    signalled, wakeup = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    pending = b""
    while True:
        ready, _, _ = select.select([0, signalled], [], [])
        if signalled in ready:
            os.read(signalled, 64)
        if 0 in ready:
            chunk = os.read(0, 1 << 16)
            *whole, pending = (pending + chunk).split(b"\n")
            yield from (line.decode() for line in whole)
            if not chunk:
                return


def main() -> None:
    wanted = json.loads(sys.argv[1])
    # Whatever a handler prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    logging.basicConfig(format="%(levelname)s:%(name)s:%(message)s", level=logging.INFO)

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")

    served: list[Any] = []
    devices: list[ublk.Device] = []
    try:
        for _ in range(wanted["count"]):
            served.append(getattr(classes, wanted["disk"])(**wanted["args"]))
            if wanted["recover"] is None:
                devices.append(served[-1].start(**wanted["start"]))
            else:
                devices.append(ublk.recover(wanted["recover"], served[-1], **wanted["start"]))
    except BaseException as error:
        answer(error=f"{type(error).__name__}: {error}")
        raise
    names = {"disk": served[0], "dev": devices[0], "disks": served, "devs": devices, "ublk": ublk}
    names |= {"vars_of": dataclasses.asdict, "wait_for": classes.wait_for, "caught": classes.caught}
    names |= {"compute_beside": classes.compute_beside}
    answer(value=[device.path for device in devices])
    for line in lines():
        if line == "exit":
            sys.exit()
        try:
            answer(value=eval(line, names))
        except BaseException as error:
            answer(error=f"{type(error).__name__}: {error}")
    for device in devices:
        device.stop()


if __name__ == "__main__":
    main()
