# SPDX-License-Identifier: MIT OR Apache-2.0
"""The catalogue of handlers that go wrong, on the stand-in driver: quick, on any machine, with the installed package.

handlers_without_kernel.py [--rounds N] [--seed N] [--only CASE]... [--plant FAULT] [--results DIR]
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent / "e2e")]

from kinds import handlers  # noqa: E402
from tools.findings import Findings  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--plant", default="")
    parser.add_argument("--results", type=Path, default=Path("/nonexistent"))
    options = parser.parse_args()
    findings = Findings("handlers", options.seed, options.results)
    handlers.campaign(findings, options.rounds, options.only, options.plant, handlers.StandIn)
    return findings.conclude()


if __name__ == "__main__":
    sys.exit(main())
