# SPDX-License-Identifier: MIT OR Apache-2.0
"""Runs a campaign in the guest: `tests/chaos/run` starts it there.

    campaign.py --kind KIND [--rounds N] [--seconds N] [--seed N] [--only NAME]... [--plant FAULT] [--results DIR]

Ends with status 0 if nothing was found, 1 if something was, 2 for wrong usage.
"""

import argparse
import importlib
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent / "e2e")]

from support import udev  # noqa: E402
from support.kernel_log import KernelLog  # noqa: E402
from support.residue import Snapshot  # noqa: E402
from tools.findings import Findings, Stuck  # noqa: E402

# Rounds that take a few minutes in an emulated machine.
KINDS = {"power": 100, "kill": 30, "handlers": 200, "control": 200, "environment": 20, "users": 100}
# What the block layer and those above it say about requests that fail; campaigns let requests fail.
IO_ERRORS = (r"EXT4-fs", r"JBD2", r"critical (target|medium) error", r"Buffer I/O error", r"protection error")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--rounds", type=int, help="how many; each kind has its own number by default")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no round begins after that")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", default=[], help="disks, cases or ways; may be given again")
    parser.add_argument("--plant", default="", help="a fault that the campaign has to find")
    parser.add_argument("--results", type=Path, default=Path("/results"))
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if os.geteuid() != 0 or not Path("/dev/ublk-control").exists():
        print("campaign.py: this makes and breaks disks: it wants root, the driver and a machine of its own (vm/run)")
        return 2
    subprocess.run(["modprobe", "loop"], check=True)
    # A task that hangs is a finding, which has to be written down before the machine ends.
    Path("/proc/sys/kernel/hung_task_panic").write_text("0")
    udev.look_only_at_new_disks()
    findings = Findings(options.kind, options.seed, options.results, options.seconds)
    kind = importlib.import_module(f"kinds.{options.kind}")
    log = KernelLog()
    before = Snapshot()
    over = follow(log)
    try:
        kind.campaign(findings, options.rounds or KINDS[options.kind], options.only, options.plant)
    except Stuck as stuck:
        findings.add(stuck.name(), f"{stuck}\n{stuck.stacks}")
        return finish(findings)
    except Exception:
        findings.add("the campaign cannot go on", traceback.format_exc())
    finally:
        over()
    if residue := before.settled_residue():
        findings.add("something is left behind", residue)
        if left := before.clean():
            findings.add("something cannot be removed", left)
    for line in log.trouble(IO_ERRORS):
        findings.add("the kernel complains", line)
    return findings.conclude()


def follow(log: KernelLog) -> Callable[[], None]:
    """Reads the kernel's log from now on, before it overwrites itself; call the result to end that."""
    over = threading.Event()

    def read() -> None:
        while not over.wait(1):
            log.read()

    thread = threading.Thread(target=read, daemon=True)
    thread.start()

    def end() -> None:
        over.set()
        thread.join()

    return end


def finish(findings: Findings) -> int:
    """Ends at once: tasks that nothing can end would hold up an ordinary end."""
    status = findings.conclude()
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
