# SPDX-License-Identifier: MIT OR Apache-2.0

"""What a device has done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class OpStats:
    """What one operation has done on a device since this process serves it."""

    requests: int
    """How many have ended."""
    bytes: int
    """Bytes of those that succeeded."""
    errors: int
    """How many have failed."""
    mean: float
    """Seconds from the wake-up that brought a request to its end; so are those below, exact to a sixteenth."""
    p50: float
    p99: float
    p99_9: float
    max: float

    @classmethod
    def _all(cls, found: list[dict[str, Any]]) -> dict[str, OpStats]:
        operations = {}
        for counts in found:
            name = counts.pop("op")
            times = {key: counts.pop(key) / 1e9 for key in ("mean", "p50", "p99", "p99_9", "max")}
            operations[name] = cls(**counts, **times)
        return operations


@dataclass(frozen=True, slots=True)
class Stats:
    """What a device has done since this process serves it."""

    operations: dict[str, OpStats]
    """By name, for each operation that has come."""
    entries: int
    """How often Python was entered for requests: once per wake-up, however many there were."""

    @property
    def requests(self) -> int:
        """Requests of all kinds."""
        return sum(operation.requests for operation in self.operations.values())
