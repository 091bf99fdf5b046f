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
import sys
from typing import Any

import disks as classes

import ublk


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
    for line in sys.stdin:
        if line == "exit\n":
            sys.exit()
        try:
            answer(value=eval(line, names))
        except BaseException as error:
            answer(error=f"{type(error).__name__}: {error}")
    for device in devices:
        device.stop()


if __name__ == "__main__":
    main()
