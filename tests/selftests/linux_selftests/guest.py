# SPDX-License-Identifier: MIT OR Apache-2.0
"""Runs the scripts in the guest, one after the other, and reports each one's result to the host.

Standard output carries one line of JSON per event, so that all that was seen before a machine dies is known.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from support.kernel_log import KernelLog
from support.processes import blocked_stacks
from support.residue import Snapshot

from . import fault_injection, observation
from .expectations import kernel_lines
from .observation import Observation

SELFTESTS = Path("/opt/ublk/extra")

# The kernel's word for a program that crashed.
_USER_FAULT = ("segfault at", "traps:", "general protection fault", "core dump")

# Output beyond this is not what a person would read.
_OUTPUT_LIMIT = 256 << 10
_LOG_LINES = 400
# How long what was killed may take to end.
_DEATH = 20.0


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def wrong_driver(wanted: str) -> str:
    """The scripts call modprobe, so look whose driver it is that is tested."""
    try:
        taint = Path("/sys/module/ublk_drv/taint").read_text()
    except FileNotFoundError:
        return "no ublk_drv is loaded"
    found = "bundled" if "O" in taint else "intree"
    return "" if found == wanted else f"the {found} driver is loaded, not the {wanted} one"


def mount_tracing() -> None:
    """debugfs mounts this at the first look, which is bpftrace's: not a thing that a script leaves behind."""
    with contextlib.suppress(FileNotFoundError):
        os.listdir("/sys/kernel/debug/tracing")


def tidy_memory() -> None:
    """Huge pages want memory in one piece, whatever ran before."""
    os.sync()
    for name, value in (("nr_hugepages", "0"), ("drop_caches", "3"), ("compact_memory", "1")):
        # Not every kernel has all of them.
        with contextlib.suppress(FileNotFoundError):
            Path("/proc/sys/vm", name).write_text(value + "\n")


def put_fio_in_front(directory: Path) -> str:
    """A PATH with a fio that never creates files in /dev.

    On a slow machine a disk may be gone before the fio that was meant for it begins. It would then make a file of
    that name in /dev, and the next disk would have no node there: what follows would test that file.
    """
    program = directory / "fio"
    program.write_text(
        "#!/bin/sh\n"
        'case "$*" in *--filename=/dev/*) set -- --allow_file_create=0 "$@" ;; esac\n'
        'exec /usr/bin/fio "$@"\n'
    )
    program.chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


def remove_files_in_place_of_nodes() -> None:
    for path in Path("/dev").glob("ublk[bc]*"):
        if path.is_file():
            path.unlink()


class Script:
    """One script: started, watched, and cleaned up after."""

    def __init__(self, name: str, limit: float) -> None:
        self.seen = Observation(name)
        self._limit = limit

    def run(self) -> str:
        """Fills in what was seen; the reason why the machine cannot go on, if there is one."""
        if self.seen.script in fault_injection.USERS:
            self.seen.void = fault_injection.defect(SELFTESTS / "kublk")
        tidy_memory()
        log = KernelLog()
        before = Snapshot()
        directory = Path(tempfile.mkdtemp(prefix="selftest-", dir="/tmp"))
        try:
            self._execute(directory, log, before)
            if residue := before.settled_residue():
                self.seen.residue = str(residue)
            left = self._clean(before) if residue else ""
            self._read_log(log)
        finally:
            log.close()
            shutil.rmtree(directory, ignore_errors=True)
        return left

    def _execute(self, directory: Path, log: KernelLog, before: Snapshot) -> None:
        begin = time.monotonic()
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                ["bash", f"./test_{self.seen.script}.sh"],
                cwd=SELFTESTS,
                env={**os.environ, "TMPDIR": str(directory), "PATH": put_fio_in_front(directory)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            while process.poll() is None:
                if time.monotonic() - begin > self._limit:
                    self.seen.blocked = blocked_stacks()
                    self._kill(process, before)
                    break
                # Before the kernel's buffer runs over.
                log.read()
                time.sleep(0.2)
            else:
                self.seen.status = process.returncode
            self.seen.seconds = round(time.monotonic() - begin, 1)
            output.seek(0)
            text = output.read(_OUTPUT_LIMIT).decode(errors="replace")
            if output.read(1):
                text += "\n(output error: too long, cut here)\n"
            self.seen.output = text

    def _kill(self, process: subprocess.Popen[bytes], before: Snapshot) -> None:
        """Ends the script with all it has started; what waited for its servers can go only when they are gone."""
        deadline = time.monotonic() + _DEATH
        while process.poll() is None and time.monotonic() < deadline:
            before.kill_new_processes()
            time.sleep(0.5)

    def _clean(self, before: Snapshot) -> str:
        before.kill_new_processes()
        try:
            subprocess.run(
                [SELFTESTS / "kublk", "del", "-a"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=60,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "`kublk del -a` hangs"
        remove_files_in_place_of_nodes()
        return before.clean()

    def _read_log(self, log: KernelLog) -> None:
        self.seen.kernel_trouble = log.trouble(kernel_lines(self.seen.script))
        self.seen.kernel_trouble += [text for _, text in log.lines if any(word in text for word in _USER_FAULT)]
        self.seen.kernel_log = [text for _, text in log.lines][-_LOG_LINES:]


def main() -> int:
    limit, *names = sys.argv[1:]
    driver = os.environ["UBLK_DRIVER"]
    if wrong := wrong_driver(driver):
        print(wrong, file=sys.stderr)
        return 1
    mount_tracing()
    for name in names:
        say(observation.begin(name))
        script = Script(name, float(limit))
        unfit = script.run()
        if wrong := wrong_driver(driver):
            script.seen.void = unfit = wrong
        say(observation.end(script.seen))
        if unfit:
            say(observation.unfit(unfit))
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
