#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Maintains the table of features and kernels in docs/reference/kernels.md.

    tests/matrix/matrix.py [DIR]

Reads the JUnit documents that `tests/run e2e e2e-long` leaves in DIR (default: target/e2e), puts what they show into
`results.json`, and writes the table anew. Drivers and kernels without a document in DIR keep their earlier results.
"""

import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = HERE / "results.json"
PAGE = ROOT / "docs/reference/kernels.md"
DOCUMENTS = ROOT / "target/e2e"
# The columns: those of tests/run, by DRIVER:KERNEL.
MACHINES = {
    "bundled:7.3": "7.3, ours",
    "intree:7.3": "7.3",
    "bundled:6.12": "6.12, ours",
    "intree:6.12": "6.12",
    "bundled:6.1": "6.1, ours",
}
# Tests that a driver without the feature refuses it as it should. They show nothing of the feature itself.
OF_REFUSALS = "older_driver"

NOT_OFFERED, NOT_RUN = "not offered", "not run"
# Of a test that ran more than once, the first of these counts.
OUTCOMES = ("failed", "passed", "skipped")


def features():
    """The rows of the table."""
    return tomllib.loads((HERE / "features.toml").read_text())["feature"]


def matches(pattern, test):
    """Whether a test, as `FILE::NAME[PARAMETERS]`, is one of a pattern's."""
    if "::" not in pattern:
        pattern += "::*"
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), test) is not None


def outcome(case):
    """The outcome of a `testcase` element."""
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def worse(one, other):
    """The outcome that counts of two of the same test."""
    return min(filter(None, (one, other)), key=OUTCOMES.index)


def cell(feature, tests, offered):
    """What the tests of a machine show of a feature."""
    if not set(feature.get("needs", ())) <= offered:
        return NOT_OFFERED
    found = Counter(
        result
        for test, result in tests.items()
        if OF_REFUSALS not in test and any(matches(pattern, test) for pattern in feature["tests"])
    )
    if not found["passed"] and not found["failed"]:
        return NOT_RUN
    ran = found["passed"] + found["failed"]
    return f"{found['failed']} of {ran} failed" if found["failed"] else f"{ran} passed"


def read(document):
    """A JUnit document's properties and the outcome of each test."""
    suite = ElementTree.parse(document).getroot().find("testsuite")
    properties = {item.get("name"): item.get("value") for item in suite.iter("property")}
    tests = {}
    for case in suite.iter("testcase"):
        test = f"{case.get('classname').rpartition('.')[2]}.py::{case.get('name')}"
        tests[test] = worse(tests.get(test), outcome(case))
    return properties | {"date": suite.get("timestamp")[:10]}, tests


def collect(directory):
    """The results of each machine of which there are documents in a directory."""
    machines = {}
    for document in sorted(directory.glob("*/*.xml")):
        properties, tests = read(document)
        known, all_tests = machines.setdefault(f"{properties['driver']}:{properties['series']}", ({}, {}))
        known |= properties
        for test, result in tests.items():
            all_tests[test] = worse(all_tests.get(test), result)
    return {
        machine: {
            "kernel": properties["kernel"],
            "date": properties["date"],
            "commit": properties["commit"],
            "tests": dict(sorted(Counter(tests.values()).items())),
            "features": {f["name"]: cell(f, tests, set(properties["offered"].split())) for f in features()},
        }
        for machine, (properties, tests) in machines.items()
    }


def table(results):
    """The table of the page in Markdown, and where its figures are from."""
    lines = [f"| | since | {' | '.join(MACHINES.values())} |", "|---|---|" + "---|" * len(MACHINES)]
    for feature in features():
        cells = [results.get(machine, {}).get("features", {}).get(feature["name"], NOT_RUN) for machine in MACHINES]
        cells = [f"**{text}**" if "failed" in text else "-" if text == NOT_RUN else text for text in cells]
        # A cell stays on one line.
        cells = [text.replace(" ", "&nbsp;") for text in cells]
        lines.append(f"| {feature['name']} | {feature['since']} | {' | '.join(cells)} |")
    lines.append("")
    for machine, name in MACHINES.items():
        if machine not in results:
            lines.append(f"* {name}: {NOT_RUN}")
            continue
        run = results[machine]
        counts = ", ".join(f"{count} {result}" for result, count in run["tests"].items())
        lines.append(f"* {name}: Linux {run['kernel']}, {run['date']}, commit {run['commit']}: {counts}")
    return "\n".join(lines) + "\n"


def with_table(page, text):
    """A page whose table is another one."""
    begin, end = "<!-- matrix -->\n", "<!-- end -->\n"
    before, _, rest = page.partition(begin)
    return before + begin + text + end + rest.partition(end)[2]


def main():
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCUMENTS
    results = json.loads(RESULTS.read_text())
    found = collect(directory)
    if not found:
        sys.exit(f"{directory} has no results: run `tests/run e2e e2e-long` first")
    results |= found
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(with_table(PAGE.read_text(), table(results)))
    print(f"{', '.join(found)}: wrote {RESULTS.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")
    subprocess.run(["git", "-C", ROOT, "diff", "--stat", "--", RESULTS, PAGE], check=False)


if __name__ == "__main__":
    main()
