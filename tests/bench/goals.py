# SPDX-License-Identifier: MIT OR Apache-2.0
"""The goals of this project against its peers, and what was reached: our default mode against the peer's best."""

from dataclasses import dataclass

# Every mode of a peer that serves the same kind of disk.
KUBLK_NULL = ("kublk-null", "kublk-null-batch", "kublk-null-auto")
KUBLK_LOOP = ("kublk-loop", "kublk-loop-batch", "kublk-loop-copy")
# A disk of the kernel without a server: what client and block layer alone take.
BASE = "null_blk"

ONE = ("randread-4k-qd1", "randwrite-4k-qd1")
DEEP = ("randread-4k-qd32", "randwrite-4k-qd32", "mixed-4k-qd32")
LARGE = ("read-128k-qd32", "write-128k-qd32")
READS = ("randread-4k-qd1", "randread-4k-qd32", "read-128k-qd32")


@dataclass(frozen=True)
class Goal:
    """A figure of a disk of ours in some jobs, and its bound.

    With `theirs`, the figure is divided by the best one of these peers. Rates must be at least the bound, everything
    else at most.
    """

    what: str
    figure: str
    ours: str
    theirs: tuple[str, ...]
    jobs: tuple[str, ...]
    bound: float


GOALS = [
    Goal("null against kublk's null", "instructions", "ublk-null", KUBLK_NULL, ONE, 1.00),
    Goal("null against kublk's null", "instructions", "ublk-null", KUBLK_NULL, DEEP, 0.95),
    Goal("null against kublk's null", "added instructions", "ublk-null", KUBLK_NULL, DEEP, 0.90),
    Goal("null against kublk's null", "rate", "ublk-null", KUBLK_NULL, DEEP, 1.00),
    Goal("null", "instructions of the server's code", "ublk-null", (), ("randread-4k-qd1",), 700),
    Goal("file against kublk's loop", "instructions", "ublk-file", KUBLK_LOOP, ONE, 0.97),
    Goal("file against kublk's loop", "instructions", "ublk-file", KUBLK_LOOP, DEEP, 0.95),
    Goal("file against kublk's loop", "rate", "ublk-file", KUBLK_LOOP, DEEP, 1.00),
    Goal("Python null against kublk's null", "instructions", "python-null", KUBLK_NULL, DEEP, 1.00),
    Goal("Python null", "instructions of the server's code", "python-null", (), DEEP[:1], 3000),
    Goal("RAM disk in Python", "instructions", "python-ram", (), DEEP[:1], 14_000),
    Goal("RAM disk in Python", "instructions", "python-ram", (), LARGE[:1], 75_000),
    Goal("Python, `async def`", "instructions", "python-tasks", (), DEEP[:1], 18_000),
    Goal("Python, `async def`", "instructions", "python-tasks", (), ONE[:1], 50_000),
    Goal("Python, `workers=2`", "instructions", "python-workers", (), ONE[:1], 45_000),
]
# Our driver against Linux's, for every peer that uses ublk.
DRIVER = 1.00
SLEEPING = 55


def _figure(rows, peer, job, figure):
    """A figure of a peer, if it was measured."""
    row, base = rows.get((peer, 1, job)), rows.get((BASE, 1, job))
    if row is None:
        return None
    if figure == "rate":
        return row.get("iops")
    if "kernel" not in row:
        return None
    if figure == "instructions":
        return row["kernel"] + row["user"]
    if base is None or "kernel" not in base:
        return None
    if figure == "added instructions":
        return row["kernel"] + row["user"] - base["kernel"] - base["user"]
    assert figure == "instructions of the server's code"
    return row["user"] - base["user"]


def _reached(goal, rows):
    """What was reached, by job."""
    best = max if goal.figure == "rate" else min
    for job in goal.jobs:
        mine = _figure(rows, goal.ours, job, goal.figure)
        if mine is None:
            continue
        if not goal.theirs:
            yield job, mine
            continue
        others = [_figure(rows, peer, job, goal.figure) for peer in goal.theirs]
        known = [other for other in others if other is not None]
        if known:
            yield job, mine / best(known)


def _text(value):
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _line(what, bound, reached, met):
    marks = [(job, _text(value), "" if met(value) else "**") for job, value in reached]
    cells = ", ".join(f"{job} {mark}{value}{mark}" for job, value, mark in marks)
    return f"| {what} | {bound} | {cells} |"


def table(document):
    """The goals in Markdown, with what was reached; missed goals are bold. Ratios count with two digits."""
    rows = {(row["peer"], row["queues"], row["job"]): row for row in document["results"]}
    lines = ["### Goals: our default mode against the peer's best", "", "| what | goal | reached |", "|---|---|---|"]
    for goal in GOALS:
        reached = list(_reached(goal, rows))
        least = goal.figure == "rate"
        if reached:
            bound = f"at {'least' if least else 'most'} {_text(goal.bound)}"

            def met(value, goal=goal, least=least):
                value = round(value, 2)
                return value >= goal.bound if least else value <= goal.bound

            lines.append(_line(f"{goal.what}: {goal.figure}", bound, reached, met))
    lines += _drivers(rows) + _sleeping(rows) + _idle(document)
    return "\n".join(lines) + "\n" if len(lines) > 4 else ""


def _drivers(rows):
    """The bundled driver against Linux's: the worst ratio of each job."""
    worst = {}
    for peer, queues, job in rows:
        ours = _figure(rows, f"{peer}@bundled", job, "instructions")
        theirs = _figure(rows, peer, job, "instructions")
        if queues == 1 and ours and theirs:
            worst[job] = max(worst.get(job, (0, "")), (ours / theirs, peer))
    reached = [(f"{job} ({peer})", ratio) for job, (ratio, peer) in sorted(worst.items())]
    what = "bundled driver against Linux's, the worst peer: instructions"
    return [_line(what, f"at most {DRIVER:.2f}", reached, lambda x: round(x, 2) <= DRIVER)] if reached else []


def _sleeping(rows):
    found = {peer: row["iops"] for (peer, queues, _), row in rows.items() if queues == 1 and "iops" in row}
    serial = found.get("python-sleeping")
    reached = [
        (peer.removeprefix("python-sleeping-"), found[peer] / serial)
        for peer in ("python-sleeping-workers", "python-sleeping-tasks")
        if serial and peer in found
    ]
    what = "Python handlers that take 10 ms, 64 in parallel against one at a time: rate"
    return [_line(what, f"at least {SLEEPING}", reached, lambda ratio: ratio >= SLEEPING)] if reached else []


def _idle(document):
    ours = [row for row in document["many"] if row["peer"] == "ublk" and "memory_kib" in row]
    most = max(ours, key=lambda row: row["count"], default=None)
    if most is None or most["count"] < 1000:
        return []
    each = most["memory_kib"] / most["count"]
    reached = f"{each:.0f} KiB, {most['threads']} threads, {most['cpu']:.1%}"
    return [f"| 1,000 idle devices of one process | 64 KiB each, 20 threads, no CPU | {reached} |"]
