# SPDX-License-Identifier: MIT OR Apache-2.0

"""Statistics of a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class OpStats:
    """Statistics of one operation since this process has served the device."""

    requests: int
    """Number of completed requests, failed ones included."""
    bytes: int
    """Bytes of successful requests."""
    errors: int
    """Number of failed requests."""
    mean: float
    """Mean latency in seconds, from the wake-up that brought a request to its completion.

    The other latencies are in seconds, too, with an error of at most 1/16.
    """
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
    """Statistics of a device since this process has served it."""

    operations: dict[str, OpStats]
    """Statistics by operation name, for operations that have occurred."""
    entries: int
    """Number of times that Python was entered for requests, once per wake-up."""

    @property
    def requests(self) -> int:
        """Number of requests of all operations."""
        return sum(operation.requests for operation in self.operations.values())
