# SPDX-License-Identifier: MIT OR Apache-2.0
"""Combines the results of both machines into one JSON document and tables.

    tests/bench/report.py DIR [--compare OLD.json]

DIR contains what tests/bench/run left: some of `rate/bench.json`, `count/bench.json` and `count-bundled/bench.json`,
and for the latter two the counter's `count.marks` and `count-bundled.marks`. Peers that were counted on the bundled
driver are called `PEER@bundled`.
"""

import argparse
import json
import re
import statistics
from pathlib import Path

import goals
from counting import windows

# The peer that others are compared with.
REFERENCE = "kublk-null"


def collect(directory):
    """Median figures of each peer, number of queues and job, over the rounds."""
    conditions, absent, failed, together, found = {}, {}, {}, {}, {}
    for kind in ("count", "count-bundled", "rate"):
        path = directory / kind / "bench.json"
        if not path.exists():
            continue
        document = json.loads(path.read_text())
        conditions[kind] = document["conditions"]
        absent |= document["absent"]
        failed |= {f"{kind}: {name}": why for name, why in document["failed"].items()}
        counted = [] if kind == "rate" else windows(directory / f"{kind}.marks")
        driver = "@bundled" if kind == "count-bundled" else ""
        for result in document["results"]:
            figures = found.setdefault((result["peer"] + driver, result["queues"], result["job"]), {})
            if kind != "rate":
                for kernel, user in counted[result["attempt"]]:
                    figures.setdefault("kernel", []).append(kernel / result["requests"])
                    figures.setdefault("user", []).append(user / result["requests"])
            else:
                for name in ("iops", "p50_us", "p99_us", "client_us", "server_us", "server_user_us"):
                    if name in result:
                        figures.setdefault(name, []).append(result[name])
        for row in document["many"]:
            if kind != "rate":
                of_window = zip(("kernel", "user"), counted[row["attempt"]][0], strict=True)
                row |= {name: count / row["requests"] for name, count in of_window}
                # The other figures of a counted window are distorted by the counting.
                row = {name: row[name] for name in ("peer", "count", "kernel", "user")}
            # The output of fio stays with the run.
            row.pop("fio", None)
            together.setdefault((row["peer"], row["count"]), {}).update(row)
    results = [
        {"peer": peer, "queues": queues, "job": job}
        | {name: statistics.median(values) for name, values in figures.items()}
        | _spread(figures)
        for (peer, queues, job), figures in found.items()
    ]
    return {
        "conditions": conditions,
        "results": results,
        "absent": absent,
        "failed": failed,
        "many": list(together.values()),
    }


def _spread(figures):
    """The number of measurements, and by how much their instruction counts differ, as a share of the median."""
    found = {"rounds": max(map(len, figures.values()))}
    if "kernel" in figures:
        totals = [kernel + user for kernel, user in zip(figures["kernel"], figures["user"], strict=True)]
        found["spread"] = (max(totals) - min(totals)) / statistics.median(totals)
    return found


def _rounded(value):
    """Figures of a run are good to two or three digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if abs(value) < 1e5 else round(value)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def compact(document):
    """A document as JSON with one line per result."""
    lines = []
    for key, value in document.items():
        if key == "others":
            runs = [f"{json.dumps(name)}: {compact(run).strip()}" for name, run in value.items()]
            text = "{\n" + ",\n".join(runs) + "\n}"
        elif isinstance(value, list) and value:
            text = "[\n" + ",\n".join(json.dumps(_rounded(row)) for row in value) + "\n]"
        else:
            text = json.dumps(_rounded(value))
        lines.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def by_numbers(job):
    """Sorts depth 32 before 128."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", job)]


def table(document, title, cell, queues):
    """A table of peers and jobs in Markdown."""
    rows = [result for result in document["results"] if result["queues"] == queues]
    jobs = sorted({row["job"] for row in rows if "sleeping" not in row["peer"]}, key=by_numbers)
    peers = sorted({row["peer"] for row in rows if "sleeping" not in row["peer"]})
    if not jobs:
        return ""
    lines = [f"### {title}", "", f"| peer | {' | '.join(jobs)} |", "|---|" + "---:|" * len(jobs)]
    by_place = {(row["peer"], row["job"]): row for row in rows}
    if not any(cell(row, None) for row in rows):
        return ""
    for peer in peers:
        cells = []
        for job in jobs:
            row, reference = by_place.get((peer, job)), by_place.get((REFERENCE, job))
            cells.append(cell(row, reference) if row else "")
        if any(cells):
            lines.append(f"| {peer} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def instructions(row, reference):
    """Thousands of instructions per request, and how many times the reference's."""
    if "kernel" not in row:
        return ""
    total = row["kernel"] + row["user"]
    text = f"{total / 1000:.1f} ({row['kernel'] / 1000:.1f}+{row['user'] / 1000:.1f})"
    if reference and "kernel" in reference:
        text += f" {total / (reference['kernel'] + reference['user']):.2f}x"
    return text


def rate(row, reference):
    """Requests per second, and how many times the reference's."""
    if "iops" not in row:
        return ""
    text = f"{row['iops']:,.0f}"
    return text + (f" {row['iops'] / reference['iops']:.2f}x" if reference and "iops" in reference else "")


def latency(row, _reference):
    """Median and 99th percentile of the latency in microseconds."""
    return f"{row['p50_us']:,.0f} / {row['p99_us']:,.0f}" if "p50_us" in row else ""


def work(row, _reference):
    """CPU time per request in microseconds: the client's, all other, and the user time of the latter."""
    if "server_us" not in row:
        return ""
    return f"{row['client_us']:,.1f} + {row['server_us']:,.1f} ({row['server_user_us']:,.1f})"


def sleeping(document):
    """Rates of handlers that sleep."""
    rows = [row for row in document["results"] if "sleeping" in row["peer"] and "iops" in row]
    serial = next((row["iops"] for row in rows if row["peer"] == "python-sleeping"), None)
    if serial is None:
        return ""
    lines = [
        "### Handlers that take 10 ms, depth 64",
        "",
        "| peer | per second | times the serial rate |",
        "|---|---:|---:|",
    ]
    lines += [
        f"| {row['peer']} | {row['iops']:,.0f} | {row['iops'] / serial:.1f} |" for row in rows if row["queues"] == 1
    ]
    return "\n".join(lines) + "\n"


def many(document):
    """Cost of many devices: of each while it is idle, and of a request while a client uses all of them."""
    if not document["many"]:
        return ""
    lines = ["### Many devices", "", "| | added in | memory, each | threads | CPU, idle | busy: per second | µs |"]
    lines[-1] += " instructions, thousands |"
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in sorted(document["many"], key=lambda row: (row["peer"], row["count"])):
        cells = [f"{row['peer']}, {row['count']:,}", "", "", "", "", "", "", ""]
        if "memory_kib" in row:
            each = row["memory_kib"] / row["count"]
            cells[1:5] = f"{row['add_s']:.1f} s", f"{each:,.0f} KiB", f"{row['threads']}", f"{row['cpu']:.1%}"
        if "iops" in row:
            cells[5:7] = f"{row['iops']:,.0f}", f"{row['p50_us']:,.0f} / {row['p99_us']:,.0f}"
        if "kernel" in row:
            cells[7] = instructions(row, None)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def compare(document, old):
    """Instruction counts that changed by more than 5 %. On a busy host, single rounds differ by more."""
    before = {(row["peer"], row["queues"], row["job"]): row for row in old["results"]}
    lines = []
    for row in document["results"]:
        was = before.get((row["peer"], row["queues"], row["job"]))
        if was and "kernel" in was and "kernel" in row:
            now, then = row["kernel"] + row["user"], was["kernel"] + was["user"]
            if abs(now / then - 1) > 0.05:
                place = f"{row['peer']} {row['job']} queues={row['queues']}"
                lines.append(f"{place}: {then:,.0f} to {now:,.0f} instructions, {now / then - 1:+.1%}")
    return "\n".join(lines) or "no change of more than 5 %"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--compare", type=Path)
    options = parser.parse_args()
    document = collect(options.directory)
    (options.directory / "bench.json").write_text(compact(document))
    parts = [f"    {kind}: {json.dumps(where)}" for kind, where in document["conditions"].items()]
    for queues in sorted({row["queues"] for row in document["results"]}):
        with_queues = f"{queues} queue{'s' if queues > 1 else ''}"
        parts.append(
            table(document, f"Thousands of instructions per request (kernel+user), {with_queues}", instructions, queues)
        )
        parts.append(table(document, f"Requests per second, {with_queues}", rate, queues))
        parts.append(table(document, f"Latency (median / 99 %) in µs, {with_queues}", latency, queues))
        title = f"CPU time per request in µs: client + server (its own code), {with_queues}"
        parts.append(table(document, title, work, queues))
    parts += [sleeping(document), many(document), goals.table(document)]
    parts += [f"absent: {peer}: {why}" for peer, why in document["absent"].items()]
    parts += [f"FAILED: {name}: {why}" for name, why in document["failed"].items()]
    text = "\n".join(part for part in parts if part)
    (options.directory / "tables.md").write_text(text + "\n")
    print(text)
    if options.compare:
        print(f"\nsince {options.compare}:\n{compare(document, json.loads(options.compare.read_text()))}")


if __name__ == "__main__":
    main()
