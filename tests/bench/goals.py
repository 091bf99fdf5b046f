# SPDX-License-Identifier: MIT OR Apache-2.0
"""The goals of this project against its peers, and what was reached: the best mode of each side."""

import re

NULL = ("ublk-null", "ublk-null-tuned", "ublk-null-no-batch")
# As python-mapped opens its file.
DIRECT = ("ublk-file", "ublk-file-tuned")
FILE = (*DIRECT, "ublk-file-no-batch", "ublk-file-buffered", "ublk-file-buffered-no-batch")
MAPPED = ("python-mapped", "python-mapped-tuned")
PYTHON_NULL = ("python-null", "python-null-tuned", "python-handle")
PYTHON_RAM = ("python-ram", "python-ram-tuned")
LOOP = ("loop", "loop-dio")
NATIVE = (*NULL, "ublk-mem", *FILE)

DEEP = ("randread-4k-qd32", "randwrite-4k-qd32", "mixed-4k-qd32")
LARGE = ("read-128k-qd32", "write-128k-qd32")
OTHER_DEPTHS = ("randread-4k-qd1", "randwrite-4k-qd1", "randread-4k-qd128", "randwrite-4k-qd128")
ALL = (*OTHER_DEPTHS, *DEEP, *LARGE)

# Figure, ours, theirs, jobs, and the bound: instructions shall be at most so many times theirs, rates at least.
GOALS = [
    ("instructions", "null", NULL, "kublk's null", ("kublk-null",), DEEP, 0.90),
    ("instructions", "null", NULL, "kublk's null", ("kublk-null",), OTHER_DEPTHS, 1.00),
    ("rate", "null", NULL, "kublk's null", ("kublk-null",), DEEP, 1.00),
    ("instructions", "file", FILE, "the kernel's loop", LOOP, LARGE, 0.80),
    ("instructions", "file", FILE, "the kernel's loop", LOOP, DEEP, 1.20),
    ("rate", "file", FILE, "the kernel's loop", LOOP, DEEP, 1.00),
    ("instructions", "file", FILE, "rublk's loop", ("rublk-loop",), ALL, 0.95),
    ("instructions", "file", FILE, "kublk's loop", ("kublk-loop",), ALL, 0.95),
    ("instructions", "no-op Python handler", PYTHON_NULL, "kublk's null", ("kublk-null",), DEEP, 1.10),
    ("rate", "no-op Python handler", PYTHON_NULL, "kublk's null", ("kublk-null",), DEEP, 0.80),
    ("instructions", "RAM disk in Python", PYTHON_RAM, "nbdkit's Python plugin", ("nbdkit-python",), DEEP, 0.10),
    ("rate", "RAM disk in Python", PYTHON_RAM, "nbdkit's Python plugin", ("nbdkit-python",), DEEP, 10.0),
    ("instructions", "Python with extents", MAPPED, "file", DIRECT, ALL, 1.02),
]


def _figure(row, kind):
    if kind == "rate":
        return row.get("iops")
    return row["kernel"] + row["user"] if "kernel" in row else None


def _best(rows, kind, peers, job, queues=1):
    """The best figure of some peers in a job, if any was measured."""
    figures = [_figure(rows[key], kind) for peer in peers if (key := (peer, queues, job)) in rows]
    known = [figure for figure in figures if figure is not None]
    return (max if kind == "rate" else min)(known, default=None)


def _ratios(rows, kind, ours, theirs, jobs):
    for job in jobs:
        mine, other = _best(rows, kind, ours, job), _best(rows, kind, theirs, job)
        if mine and other:
            yield job, mine / other


def _scaling(rows):
    """How many times the rate of one queue two have, for each native disk and job."""
    for peer in NATIVE:
        for job in ALL:
            one, two = (_best(rows, "rate", (peer,), job, queues) for queues in (1, 2))
            if one and two:
                yield f"{peer} {job}", two / one


def _row(what, goal, ratios, met):
    """A line of the table. Ratios are rounded to two digits, like the figures that they are made of."""
    marks = [(job, f"{ratio:.2f}", "" if met(round(ratio, 2)) else "**") for job, ratio in ratios]
    cells = ", ".join(f"{job} {mark}{ratio}{mark}" for job, ratio, mark in marks)
    return f"| {what} | {goal} | {cells} |"


def table(document):
    """The goals in Markdown, with what was reached; missed goals are bold."""
    rows = {(row["peer"], row["queues"], row["job"]): row for row in document["results"]}
    lines = ["### Goals: ratio to the peer's figure, best mode of each side", "", "| what | goal | reached |"]
    lines.append("|---|---|---|")
    for kind, name, ours, peer, theirs, jobs, bound in GOALS:
        ratios = list(_ratios(rows, kind, ours, theirs, jobs))
        least = kind == "rate"
        if ratios:
            what = f"{name} against {peer}: {kind}"
            goal = f"at {'least' if least else 'most'} {bound:.2f}"
            lines.append(_row(what, goal, ratios, lambda x, b=bound, up=least: x >= b if up else x <= b))
    scaling = sorted(_scaling(rows), key=lambda pair: -pair[1])[:4]
    if scaling:
        lines.append(_row("two queues against one, native: rate", "at least 1.60", scaling, lambda ratio: ratio >= 1.6))
    lines += _sleeping(rows)
    lines += _idle(document)
    return "\n".join(lines) + "\n" if len(lines) > 4 else ""


def _sleeping(rows):
    found = {peer: row["iops"] for (peer, queues, _), row in rows.items() if queues == 1 and "iops" in row}
    serial = found.get("python-sleeping")
    ratios = [
        (re.sub("python-sleeping-", "", peer), found[peer] / serial)
        for peer in ("python-sleeping-workers", "python-sleeping-tasks")
        if serial and peer in found
    ]
    what = "Python handlers that take 10 ms, 64 in parallel against one at a time: rate"
    return [_row(what, "at least 50", ratios, lambda ratio: ratio >= 50)] if ratios else []


def _idle(document):
    ours = [row for row in document["many"] if row["peer"] == "ublk" and "memory_kib" in row]
    most = max(ours, key=lambda row: row["count"], default=None)
    if most is None or most["count"] < 1000:
        return []
    each = most["memory_kib"] / most["count"]
    reached = f"{each:.0f} KiB, {most['threads']} threads, {most['cpu']:.1%}"
    return [f"| 1,000 idle devices of one process | 64 KiB each, 20 threads, no CPU | {reached} |"]
