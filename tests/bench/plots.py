# SPDX-License-Identifier: MIT OR Apache-2.0
"""Draws the results of a run.

    tests/bench/plots.py BENCH.json DIR

For each job with one queue: the instructions per request of each peer, kernel's and user's, as an SVG file in DIR.
"""

import json
import sys
from html import escape
from pathlib import Path

WIDTH, LEFT, RIGHT, TOP, BAR, GAP = 760, 170, 120, 44, 14, 6
KERNEL, USER, OURS, TEXT = "#4878a8", "#e0a040", "#1a7030", "#333"
# Handlers that sleep have a table of their own.
LEFT_OUT = "sleeping"


def is_ours(peer):
    """Whether a peer is a disk of this project."""
    return peer.startswith(("ublk-", "python-"))


def chart(title, rows):
    """Bars of two parts each: rows are a name, kernel's and user's instructions."""
    rows = sorted(rows, key=lambda row: row[1] + row[2])
    # One long bar would shorten all others.
    longest = sorted(kernel + user for _, kernel, user in rows)[max(0, len(rows) * 9 // 10 - 1)] * 1.1
    scale = (WIDTH - LEFT - RIGHT) / longest
    height = TOP + len(rows) * (BAR + GAP) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="16" font-size="14" fill="{TEXT}">{escape(title)}</text>',
        f'<text x="{LEFT}" y="34" fill="{TEXT}">thousands of instructions per request: '
        f'<tspan fill="{KERNEL}">kernel</tspan> + <tspan fill="{USER}">user</tspan>; '
        f'<tspan fill="{OURS}">ours in green</tspan></text>',
    ]
    for number, (name, kernel, user) in enumerate(rows):
        y = TOP + number * (BAR + GAP)
        first = min(kernel, longest) * scale
        second = min(user, max(0, longest - kernel)) * scale
        more = " (bar cut)" if kernel + user > longest else ""
        color = OURS if is_ours(name) else TEXT
        baseline = y + BAR - 3
        parts += [
            f'<text x="{LEFT - 8}" y="{baseline}" text-anchor="end" fill="{color}">{escape(name)}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{first:.1f}" height="{BAR}" fill="{KERNEL}"/>',
            f'<rect x="{LEFT + first:.1f}" y="{y}" width="{second:.1f}" height="{BAR}" fill="{USER}"/>',
            f'<text x="{LEFT + first + second + 6:.1f}" y="{baseline}" fill="{TEXT}">{(kernel + user) / 1000:.1f}{more}'
            f"</text>",
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def charts(document):
    """The picture of each job with one queue."""
    where = next(iter(document["conditions"].values()))
    jobs = {}
    for row in document["results"]:
        if row["queues"] == 1 and "kernel" in row and LEFT_OUT not in row["peer"]:
            jobs.setdefault(row["job"], []).append((row["peer"], row["kernel"], row["user"]))
    return {job: chart(f"{job}, Linux {where['kernel']}, {where['cpus']} CPUs", rows) for job, rows in jobs.items()}


def main():
    document, directory = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    if not document["conditions"]:
        sys.exit("tests/bench/plots.py: nothing was measured")
    for job, text in charts(document).items():
        (directory / f"{job}.svg").write_text(text)


if __name__ == "__main__":
    main()
