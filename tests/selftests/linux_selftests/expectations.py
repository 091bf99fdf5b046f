# SPDX-License-Identifier: MIT OR Apache-2.0
"""Outcomes other than "pass" that are known, with their reasons, and lines that only look like complaints.

An entry covers what it names and no more: a script that is known to fail by its output still fails the run when it
also hangs, leaves something behind or makes the kernel complain. A skip that is not on record is a failure: a
selftest that does not run proves nothing.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Expectation:
    """A known outcome of a script."""

    script: str
    # "fail" or "skip".
    verdict: str
    reason: str
    # The drivers that it is known of.
    drivers: tuple[str, ...]
    # Where the problems of a known failure are seen (the values of verdict.Kind).
    kinds: tuple[str, ...] = ()


KNOWN = (
    Expectation(
        "integrity_02",
        "skip",
        "wants fio 3.42, which can hand protection information to io_uring; Debian trixie has 3.39",
        drivers=("intree", "bundled"),
    ),
    Expectation(
        "recover_03",
        "fail",
        "the driver's QUIESCE_DEV leaves a device LIVE whose tags are all busy: its server is not notified",
        drivers=("intree",),
        kinds=("output",),
    ),
)

# Lines that any script may print when all is well; expressions.
HARMLESS_EVERYWHERE = [
    # `kublk del` begins to watch for the server's end after it has looked whether the server is there. When that
    # ends in between, it waits for ten seconds, says this and looks again. A server that is still there then is
    # found as something left behind.
    r"^wait_ublk_dev: poll inotify timeout$",
]

# The same for one script.
HARMLESS = {
    # udev reads the disk whose every request takes two seconds.
    "generic_06": [r"^Timed out while waiting for udev queue to empty\.$"],
    # The server that it wants to die while it recovers.
    "generic_17": [r"^\./test_generic_17\.sh: line \d+: +\d+ Killed .*--die_during_fetch 1$"],
    # Names of cases.
    "params_01": [r"^too many (open|active) zones$"],
}

# Scripts, or groups of them, that make requests fail: they kill servers, delete disks under I/O, hold partition scans
# up, or corrupt protection information, which udev's reads of a fresh disk find missing, too. The kernel may say that
# requests failed, and what the expressions match; the other scripts' requests all succeed.
FAILING_REQUESTS: dict[str, list[str]] = {
    "generic_06": [],
    "generic_16": [],
    "generic_17": [],
    "integrity": [r"^ublkb\d+: (ref|guard|app) tag error at "],
    "part_02": [],
    "recover": [],
    "stress": [],
}


def expectation(script: str, driver: str) -> Expectation | None:
    for entry in KNOWN:
        if entry.script == script and driver in entry.drivers:
            return entry
    return None


def harmless(script: str) -> list[str]:
    return HARMLESS_EVERYWHERE + HARMLESS.get(script, [])


def kernel_lines(script: str) -> list[str] | None:
    """Expressions for lines of the kernel's log that go with failing requests; None if none may fail."""
    return FAILING_REQUESTS.get(script, FAILING_REQUESTS.get(script.rpartition("_")[0]))
