# SPDX-License-Identifier: MIT OR Apache-2.0
"""The short form, in the guest: a few rounds of each kind, or the planted faults that each kind has to find."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Step:
    """A campaign, and what it has to find if a fault is planted."""

    kind: str
    rounds: int
    only: tuple[str, ...] = ()
    plant: str = ""
    finds: str = ""


CAMPAIGNS = [
    Step("power", 24, ("file-direct", "python", "file-buffered")),
    Step("kill", 4, ("file-direct", "python", "reissue", "queue")),
    Step("handlers", 4),
    Step("control", 16),
    Step("environment", 3),
    Step("users", 8),
]
# Those of handlers are planted without a machine (`test_planted_handlers.py`).
PLANTED = [
    Step("power", 12, plant="FlushesNothing", finds="an acknowledged write is not there after a power cut"),
    Step("power", 12, plant="FlushesWhatItsQueueWrote", finds="an acknowledged write is not there after a power cut"),
    Step("power", 12, plant="ForgetsAtRecovery", finds="an acknowledged write is not there after a power cut"),
    Step("kill", 10, ("reissue",), plant="WritesLate", finds="an acknowledged write is not there"),
    Step("control", 4, ("list",), plant="hangs", finds="does not end within"),
    Step("control", 8, ("list",), plant="says-nothing", finds="fails without a word"),
    Step("control", 8, ("list",), plant="crashes", finds="crashes"),
    Step("environment", 1, plant="wrong-bytes", finds="bytes that were never written there"),
    Step("users", 6, ("del",), plant="root", finds="is not refused"),
]
# Seeds with which a planted fault has to be found once.
ATTEMPTS = 8


def run(step: Step, seed: int) -> str:
    """Runs a campaign; what is wrong with how it ended."""
    with tempfile.TemporaryDirectory() as results:
        argv = [sys.executable, "-u", str(HERE / "campaign.py"), "--kind", step.kind, "--rounds", str(step.rounds)]
        argv += ["--seed", str(seed), "--results", results]
        argv += [word for name in step.only for word in ("--only", name)]
        argv += ["--plant", step.plant] if step.plant else []
        status = subprocess.run(argv, check=False).returncode
        try:
            findings = json.loads(Path(results, f"{step.kind}.json").read_text())["findings"]
        except OSError:
            return f"status {status} and no results"
    if not step.plant:
        return "" if status == 0 else f"status {status}: {'; '.join(findings)}"
    if status == 1 and any(step.finds in finding for finding in findings):
        return ""
    return f"the planted fault was not found (status {status}): {'; '.join(findings) or 'nothing was'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--planted", action="store_true", help="the planted faults instead")
    options = parser.parse_args()
    failed = []
    for step in PLANTED if options.planted else CAMPAIGNS:
        name = f"{step.kind} {step.plant}".strip()
        began = time.monotonic()
        # Whether a fault shows depends on what happens at the same time, and so on the machine.
        for seed in range(options.seed, options.seed + (ATTEMPTS if step.plant else 1)):
            wrong = run(step, seed)
            if not wrong:
                break
        print(f"== {name}: {wrong or 'passed'} ({time.monotonic() - began:.0f} s)", flush=True)
        failed += [f"{name}: {wrong}"] if wrong else []
    print("\n".join(["chaos: all passed"] if not failed else ["chaos FAILED:", *failed]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
