# SPDX-License-Identifier: MIT OR Apache-2.0
"""Reports of the results: a line per script while they come, a table, and JSON."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from .verdict import Judgement

# One script in the JSON file.
Record = dict[str, Any]

_REASON_WIDTH = 110


def _cut(text: str) -> str:
    return text if len(text) <= _REASON_WIDTH else text[: _REASON_WIDTH - 3] + "..."


def record(judgement: Judgement) -> Record:
    """The judgement as the JSON file has it."""
    seen = judgement.observation
    return {
        "script": seen.script,
        "exit_status": seen.status,
        "verdict": judgement.verdict.value,
        "label": judgement.label,
        "acceptable": judgement.acceptable,
        "seconds": seen.seconds,
        "reason": judgement.reason,
        "problems": [str(problem) for problem in judgement.problems],
    }


def line(record: Record) -> str:
    status = "-" if record["exit_status"] is None else record["exit_status"]
    text = (
        f"{record['script']:14} {record['label']:18} {status:>4} {record['seconds']:7.1f} s  {_cut(record['reason'])}"
    )
    return text.rstrip()


def table(records: list[Record]) -> str:
    head = f"{'script':14} {'verdict':18} {'exit':>4} {'time':>9}  reason"
    return "\n".join([head, *map(line, records)])


def summary(records: list[Record]) -> str:
    counted = Counter(record["label"] for record in records)
    return f"{len(records)} scripts: " + ", ".join(f"{count} {label}" for label, count in counted.most_common())


def write_log(directory: Path, judgement: Judgement) -> None:
    """All that is known of one script."""
    seen = judgement.observation
    parts = {
        "verdict": f"{line(record(judgement))}\n" + "\n".join(str(problem) for problem in judgement.problems),
        "output": seen.output,
        "kernel log": "\n".join(seen.kernel_log),
        "left behind": seen.residue,
        "blocked when the time was over": seen.blocked,
    }
    text = "".join(f"== {name}\n{part.rstrip()}\n\n" for name, part in parts.items() if part.strip())
    (directory / f"{seen.script}.log").write_text(text)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Replaces the file as a whole: it is written after each script and may be read at any time."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(document, indent=1) + "\n")
    fresh.replace(path)
