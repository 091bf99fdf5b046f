# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the guest saw of one script; travels to the host as a line of JSON."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Observation:
    """One script's run, not yet judged."""

    script: str
    # None if it had to be killed, or if the machine ended first.
    status: int | None = None
    seconds: float = 0.0
    output: str = ""
    # Lines of the kernel's log that a clean run does not have, and all lines for who looks into it.
    kernel_trouble: list[str] = field(default_factory=list)
    kernel_log: list[str] = field(default_factory=list)
    # Devices, processes and mounts that were there when it had ended.
    residue: str = ""
    # Why the result means nothing, if it does: the test tool or the machine was not as it should be.
    void: str = ""
    # Where tasks were blocked when the time was over.
    blocked: str = ""
    # How the machine ended, if it did so before the script.
    machine: str = ""

    @classmethod
    def from_event(cls, event: dict[str, Any]) -> "Observation":
        return cls(**event["observation"])


def event(kind: str, **values: Any) -> str:
    """A line of the guest's output."""
    return json.dumps({"event": kind, **values})


def begin(script: str) -> str:
    return event("begin", script=script)


def end(observation: Observation) -> str:
    return event("end", observation=asdict(observation))


def unfit(reason: str) -> str:
    """The machine cannot take another script."""
    return event("unfit", reason=reason)
