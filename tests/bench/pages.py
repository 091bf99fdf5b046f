# SPDX-License-Identifier: MIT OR Apache-2.0
"""Writes the tables of BENCHMARKS.md and goals.md and the two plots, from the committed results.

tests/bench/pages.py
"""

import json
from pathlib import Path

import goals
import plots

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results/7.3-tcg-2026-11-28.json"
PAGE, GOALS = HERE.parent.parent / "BENCHMARKS.md", HERE / "goals.md"
# Eight of others, and this project's disks of the same kind in their default mode.
PEERS = {
    "does nothing": ("kublk-null", "rublk-null", "ublk-null", "python-null"),
    "a file": ("loop", "loop-dio", "kublk-loop", "rublk-loop", "ublk-file"),
    "RAM": ("nbdkit-memory", "nbdkit-python", "ublk-mem", "python-ram"),
}
JOBS = ("randread-4k-qd1", "randread-4k-qd32", "randwrite-4k-qd32", "read-128k-qd32")
PLOTTED = ("randread-4k-qd1", "randread-4k-qd32")


def peers(document):
    """The table of BENCHMARKS.md: thousands of instructions per request, and thousands of requests per second."""
    rows = {(row["peer"], row["job"]): row for row in document["results"] if row["queues"] == 1}
    lines = [f"| disk | peer | {' | '.join(JOBS)} |", "|---|---|" + "---:|" * len(JOBS)]
    for kind, names in PEERS.items():
        for name in names:
            cells = [
                f"{(row['kernel'] + row['user']) / 1000:.1f} · {row['iops'] / 1000:.1f}"
                for row in (rows[name, job] for job in JOBS)
            ]
            shown = f"**{name}**" if plots.is_ours(name) else name
            lines.append(f"| {kind} | {shown} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(page, name, text):
    """A page whose table of a name is another one."""
    begin, end = f"<!-- {name} -->\n", "<!-- end -->\n"
    before, found, rest = page.partition(begin)
    assert found, name
    return before + begin + text + end + rest.partition(end)[2]


def goals_table(document):
    """The goals without the heading."""
    return goals.table(document).partition("\n\n")[2]


def pages(document):
    """The text of each file that is made from the results."""
    others = document["others"]
    text = GOALS.read_text()
    for name, run in {"all peers": document, **others}.items():
        text = with_table(text, name, goals_table(run))
    made = {PAGE: with_table(PAGE.read_text(), "peers", peers(document)), GOALS: text}
    shown = {name for names in PEERS.values() for name in names}
    some = document | {"results": [row for row in document["results"] if row["peer"] in shown]}
    charts = plots.charts(some)
    return made | {RESULTS.parent / f"{job}.svg": charts[job] for job in PLOTTED}


def main():
    for path, text in pages(json.loads(RESULTS.read_text())).items():
        path.write_text(text)


if __name__ == "__main__":
    main()
