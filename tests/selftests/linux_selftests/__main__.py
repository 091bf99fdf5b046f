# SPDX-License-Identifier: MIT OR Apache-2.0
"""The command line."""

import argparse
import json
import os
import re
import signal
import sys
from pathlib import Path
from types import FrameType

from . import build, machine, report
from .build import BuildError
from .expectations import expectation, harmless
from .machine import MachineError
from .observation import Observation
from .report import Record
from .selection import SelectionError, choose, shard
from .verdict import judge

_REPOSITORY = Path(__file__).resolve().parents[3]
# The series whose selftests are taken for a kernel that is not named by numbers.
_SERIES = "7.3"

_FAILED, _NO_RUN = 1, 125

_EPILOG = """\
exit status:
  0    every script passed, or did what is known of it
  1    one did not, or the kernel complained outside of the scripts
  125  the scripts could not be run
"""


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 100_000:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds from 1 to 100000")
    return value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tests/selftests/run",
        description="Runs Linux's own selftests of ublk in the virtual machine, and judges them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernel", default=_SERIES, metavar="VERSION", help="as for vm/run (default: %(default)s)")
    parser.add_argument("--driver", default="intree", choices=["intree", "bundled"], help="default: %(default)s")
    parser.add_argument("--memory", default="4G", metavar="SIZE", help="of the machine (default: %(default)s)")
    parser.add_argument("--results", type=Path, metavar="DIR", help="default: selftests/KERNEL-DRIVER in target/")
    parser.add_argument("--limit", type=_seconds, default=900.0, metavar="SECONDS", help="per script (default: 900)")
    parser.add_argument("--shard", type=shard, default=(1, 1), metavar="I/N", help="the I-th of N parts of the suite")
    parser.add_argument("--resume", action="store_true", help="leaves out what the results directory has already")
    parser.add_argument("--list", action="store_true", help="prints the names of the scripts and ends")
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help="null_01, or stress for all of the group")
    return parser.parse_args()


class Suite:
    """The results, as they come."""

    def __init__(self, options: machine.Options, total: int, earlier: list[Record]) -> None:
        self._options = options
        self._total = total
        self._begun = 0
        self._records = {record["script"]: record for record in earlier}

    def records(self) -> list[Record]:
        return [self._records[name] for name in sorted(self._records)]

    def begin(self, script: str) -> None:
        self._begun += 1
        print(f"[{self._begun:2}/{self._total}] {script:14} ...", flush=True)

    def end(self, seen: Observation) -> None:
        judgement = judge(seen, expectation(seen.script, self._options.driver), harmless(seen.script))
        record = report.record(judgement)
        self._records[seen.script] = record
        report.write_log(self._options.results, judgement)
        self.write(None)
        print(f"        {report.line(record)}", flush=True)

    def write(self, tally: machine.Tally | None) -> bool:
        """Writes the results so far; whether all is well."""
        records = self.records()
        unexplained = tally.unexplained if tally else []
        good = all(record["acceptable"] for record in records) and not unexplained
        document = {
            **identity(self._options),
            "complete": tally is not None,
            "good": good and tally is not None,
            "machines": tally.statuses if tally else [],
            "unexplained": unexplained,
            "scripts": records,
        }
        report.write_json(self._options.results / "results.json", document)
        return good


def identity(options: machine.Options) -> dict[str, str]:
    """What results must have in common to belong together."""
    return {"kernel": options.kernel, "driver": options.driver, "source": options.selftests.source}


def _earlier(options: machine.Options) -> list[Record]:
    try:
        document = json.loads((options.results / "results.json").read_text())
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise BuildError(f"{options.results / 'results.json'} cannot be read: {error}") from error
    here = identity(options)
    if {name: document.get(name) for name in here} != here:
        raise BuildError(f"{options.results} has the results of another kernel, driver or source: no --resume there")
    records: list[Record] = document["scripts"]
    return records


def _run(arguments: argparse.Namespace) -> int:
    series = re.match(r"\d+\.\d+", arguments.kernel)
    selftests = build.obtain(_REPOSITORY, series[0] if series else _SERIES)
    if arguments.list:
        print("\n".join(selftests.scripts()))
        return 0
    target = Path(os.environ.get("CARGO_TARGET_DIR") or _REPOSITORY / "target")
    results = arguments.results or target / "selftests" / f"{arguments.kernel}-{arguments.driver}"
    results = results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    options = machine.Options(
        _REPOSITORY, selftests, arguments.kernel, arguments.driver, arguments.memory, arguments.limit, results
    )
    scripts = choose(selftests.scripts(), arguments.scripts, arguments.shard)
    earlier = _earlier(options) if arguments.resume else []
    done = {record["script"] for record in earlier}
    scripts = [name for name in scripts if name not in done]
    print(f"{selftests.source}: {len(scripts)} scripts, {options.driver} driver, Linux {options.kernel}", flush=True)
    suite = Suite(options, len(scripts), earlier)
    tally = machine.run(options, scripts, suite.begin, suite.end, lambda text: print(f"-- {text}", flush=True))
    good = suite.write(tally)
    print(f"\n{report.table(suite.records())}\n\n{report.summary(suite.records())}")
    for text in tally.unexplained:
        print(text)
    if earlier:
        print(f"{len(earlier)} results are of an earlier run")
    print(f"results: {results}")
    return 0 if good else _FAILED


def _end_by(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end_by)
    try:
        return _run(_arguments())
    except (BuildError, MachineError, SelectionError) as error:
        print(f"tests/selftests/run: {error}", file=sys.stderr)
        return _NO_RUN


if __name__ == "__main__":
    sys.exit(main())
