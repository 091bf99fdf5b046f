# SPDX-License-Identifier: MIT OR Apache-2.0
"""The demonstration: serves a disk written in Python and uses it as any disk.

Runs inside the virtual machine; `vm/demo` starts it. Each step is a function that returns a short description of its
result, or raises. At the end the disk is stopped and everything is unmounted in any case.
"""

import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

DISK = "/opt/ublk/examples/ramdisk.py:RamDisk"
DISK_SIZE = "1G"
QUEUES = 2
FIO_SECONDS = 30
# Emulated machines are slow; a step that takes longer than this hangs.
STEP_SECONDS = 240
# Lines of a failed program's output that are shown.
SHOWN_LINES = 12


class Failed(Exception):
    """A step did not do what it should."""


def run(*argv: str, input: str | None = None) -> str:
    """Runs a program to its end and returns its output; raises with the beginning of it if it fails."""
    try:
        ended = subprocess.run(
            argv,
            input=input,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=STEP_SECONDS,
        )
    except FileNotFoundError:
        raise Failed(f"there is no {argv[0]} in this machine") from None
    except subprocess.TimeoutExpired:
        raise Failed(f"{' '.join(argv)} still ran after {STEP_SECONDS} s") from None
    if ended.returncode != 0:
        said = ended.stdout.strip().splitlines()
        if len(said) > SHOWN_LINES:
            said = [*said[:SHOWN_LINES], f"... and {len(said) - SHOWN_LINES} more lines"]
        raise Failed("\n".join([f"{' '.join(argv)} ended with status {ended.returncode}:", *said]))
    return ended.stdout


def wait_for(path: str, seconds: float = 20) -> None:
    """Wait for a node to appear."""
    deadline = time.monotonic() + seconds
    while not os.path.exists(path):
        if time.monotonic() >= deadline:
            raise Failed(f"{path} did not appear within {seconds:g} s")
        time.sleep(0.05)


def mebibytes(count: float) -> str:
    """Format a number of bytes."""
    return f"{count / (1 << 20):,.1f} MiB"


class Served:
    """The RAM disk of the README, served by `ublk run`."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.path = ""

    def start(self) -> str:
        """Start the server and wait for the disk."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ublk", "run", DISK, "--size", DISK_SIZE, "--queues", str(QUEUES)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        ready, _, _ = select.select([self.process.stdout], [], [], 60)
        self.path = self.process.stdout.readline().strip() if ready else ""
        if not self.path:
            raise Failed(f"no disk: the server's status is {self.process.poll()}")
        return f"{self.path}, {DISK_SIZE}, {QUEUES} queues, process {self.process.pid}"

    def check(self) -> None:
        """Fails if the server is gone, which explains any other failure."""
        if self.process is not None and self.process.poll() is not None:
            raise Failed(f"the disk's server has ended with status {self.process.returncode}")

    def stop(self) -> str:
        """Stop the server as a service manager does."""
        process, self.process = self.process, None
        if process is None:
            return "was not started"
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)
            raise Failed(f"the server of {self.path} did not end within 60 s after SIGTERM and was killed") from None
        left = [node for node in (self.path, self.path.replace("ublkb", "ublkc")) if os.path.exists(node)]
        if self.path and left:
            run(sys.executable, "-m", "ublk", "del", "-n", self.path.removeprefix("/dev/ublkb"))
        if status != 0 or left:
            removed = f"; it left {' and '.join(left)}, now removed" if left else ""
            raise Failed(f"the server of {self.path or 'the disk'} ended with status {status}{removed}")
        return "server ended with status 0, nothing left"


@dataclass(frozen=True)
class FileSystem:
    """How to make and check a file system."""

    name: str
    make: Sequence[str]
    check: Sequence[str]


EXT4 = FileSystem("ext4", ("mkfs.ext4", "-q", "-F"), ("e2fsck", "-f", "-n"))
XFS = FileSystem("xfs", ("mkfs.xfs", "-q", "-f"), ("xfs_repair", "-n"))
BTRFS = FileSystem("btrfs", ("mkfs.btrfs", "-q", "-f"), ("btrfs", "check", "--readonly"))


class Tree:
    """The files that are copied: Python's standard library, and their digests."""

    def __init__(self) -> None:
        self.source = Path(sysconfig.get_paths()["stdlib"])
        self.digests: dict[str, str] = {}
        self.size = 0

    def read(self) -> str:
        """Read everything once."""
        self.digests, self.size = digests_of(self.source)
        if len(self.digests) < 1000:
            raise Failed(f"{self.source} has {len(self.digests)} files, not thousands")
        return f"{self.source}: {len(self.digests):,} files, {mebibytes(self.size)}"


def digests_of(directory: Path) -> tuple[dict[str, str], int]:
    """Digests of all files and links below a directory, and their total size."""
    digests, size = {}, 0
    for path in directory.rglob("*"):
        name = str(path.relative_to(directory))
        if path.is_symlink():
            digests[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            with path.open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
            size += path.stat().st_size
    return digests, size


class Demo:
    """The disk, its partition, and the steps."""

    def __init__(self) -> None:
        self.disk = Served()
        self.tree = Tree()
        self.mount_point = Path(tempfile.mkdtemp(prefix="ublk-demo-"))
        self.is_mounted = False

    @property
    def partition(self) -> str:
        """The partition's node."""
        return f"{self.disk.path}p1"

    def steps(self) -> list[tuple[str, Callable[[], str]]]:
        """All steps in order."""
        steps = [
            ("serve the RAM disk", self.disk.start),
            ("partition it", self.make_partition),
            ("read what will be copied", self.tree.read),
            *self.file_system(EXT4),
            (f"fio: {FIO_SECONDS} s random writes, verified", self.fio),
            *self.file_system(XFS),
            *self.file_system(BTRFS),
            ("stop", self.disk.stop),
        ]
        return steps

    def file_system(self, system: FileSystem) -> list[tuple[str, Callable[[], str]]]:
        """The steps with one file system."""
        name = system.name
        return [
            (f"{name}: make", lambda: self.make(system)),
            (f"{name}: mount and copy", self.copy),
            (f"{name}: unmount", self.unmount),
            (f"{name}: {' '.join(system.check)}", lambda: self.check(system)),
            (f"{name}: mount again and compare", self.compare),
            (f"{name}: unmount again", self.unmount),
        ]

    def make_partition(self) -> str:
        """Write a partition table with one partition."""
        run("sfdisk", "--quiet", self.disk.path, input="label: gpt\ntype=linux\n")
        run("udevadm", "settle")
        wait_for(self.partition)
        size = int(run("blockdev", "--getsize64", self.partition))
        return f"{self.partition}, {mebibytes(size)}"

    def make(self, system: FileSystem) -> str:
        """Make a file system on the partition."""
        run(*system.make, self.partition)
        kind = run("blkid", "-p", "-s", "TYPE", "-o", "value", self.partition).strip()
        if kind != system.name:
            raise Failed(f"{self.partition} holds {kind or 'nothing'} instead of {system.name}")
        return " ".join((*system.make, self.partition))

    def mount(self, *options: str) -> None:
        """Mount the partition."""
        run("mount", *options, self.partition, str(self.mount_point))
        self.is_mounted = True

    def unmount(self) -> str:
        """Unmount it and drop the caches."""
        run("umount", str(self.mount_point))
        self.is_mounted = False
        # The next reads reach the disk.
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        return "everything written back"

    def copy(self) -> str:
        """Mount the new file system and copy the tree into it."""
        self.mount()
        run("cp", "-a", f"{self.tree.source}/.", str(self.mount_point / "tree"))
        return f"{len(self.tree.digests):,} files, {mebibytes(self.tree.size)}"

    def check(self, system: FileSystem) -> str:
        """Run the file system's checker."""
        lines = run(*system.check, self.partition).strip().splitlines()
        return lines[-1] if system is EXT4 else "no error found"

    def compare(self) -> str:
        """Mount it again and compare every file."""
        self.mount("-o", "ro")
        found, size = digests_of(self.mount_point / "tree")
        expected = self.tree.digests
        missing, surplus = expected.keys() - found.keys(), found.keys() - expected.keys()
        differing = {name for name in expected.keys() & found.keys() if expected[name] != found[name]}
        if missing or surplus or differing:
            examples = ", ".join(sorted(missing | surplus | differing)[:5])
            raise Failed(
                f"{len(missing)} files are missing, {len(surplus)} are too many, {len(differing)} differ: {examples}"
            )
        return f"{len(found):,} files, {mebibytes(size)}: every SHA-256 is the same"

    def fio(self) -> str:
        """Write to the raw partition at random places and verify what was written."""
        output = run(
            "fio",
            "--name=demo",
            f"--filename={self.partition}",
            "--allow_file_create=0",
            "--ioengine=io_uring",
            "--direct=1",
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=32",
            "--size=256M",
            "--time_based",
            f"--runtime={FIO_SECONDS}",
            "--verify=crc32c",
            "--verify_backlog=1024",
            "--verify_fatal=1",
            "--output-format=json",
        )
        job = json.loads(output[output.index("{") :])["jobs"][0]
        written, read = job["write"], job["read"]
        if job["error"] or not written["total_ios"] or not read["total_ios"]:
            raise Failed(f"fio wrote {written['total_ios']} and verified {read['total_ios']}, error {job['error']}")
        return (
            f"{written['total_ios']:,} writes ({mebibytes(written['io_bytes'])}, {written['iops']:,.0f}/s), "
            f"{read['total_ios']:,} verified"
        )

    def clean(self) -> list[str]:
        """Undo what is left to undo, and return what failed."""
        problems = []
        for what, action in (("unmount", self.unmount if self.is_mounted else None), ("stop", self.disk.stop)):
            try:
                if action:
                    action()
            except Failed as error:
                problems.append(f"{what}: {error}")
        if not self.is_mounted:
            shutil.rmtree(self.mount_point, ignore_errors=True)
        return problems


@dataclass(frozen=True)
class Row:
    """A line of the closing table."""

    step: str
    result: str
    seconds: str
    detail: str


def table(rows: Sequence[Row]) -> str:
    """Lay out the closing table."""
    head = Row("step", "result", "seconds", "")
    widths = [max(len(getattr(row, name)) for row in (head, *rows)) for name in ("step", "result", "seconds")]
    lines = []
    for row in (head, *rows):
        cells = f"{row.step:<{widths[0]}}  {row.result:<{widths[1]}}  {row.seconds:>{widths[2]}}  {row.detail}"
        lines.append(cells.rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def end_by_signal(number: int, _: object) -> None:
    """Turn a signal into an exit that cleans up."""
    raise SystemExit(128 + number)


def perform(demo: Demo) -> tuple[list[Row], str]:
    """Runs the steps up to the first that fails; returns the table's rows and why it failed."""
    steps = demo.steps()
    width = max(len(name) for name, _ in steps)
    began = time.monotonic()
    rows: list[Row] = []
    failure = ""
    for name, step in steps:
        if failure:
            rows.append(Row(name, "not run", "", ""))
            continue
        print(f"[{time.monotonic() - began:6.1f} s] {name:<{width}} ", end="")
        started = time.monotonic()
        try:
            demo.disk.check()
            detail = step()
        except Exception as error:
            failure = f"{name}: {error if isinstance(error, Failed) else f'{type(error).__name__}: {error}'}"
        except BaseException:
            print("interrupted")
            raise
        taken = time.monotonic() - started
        print(f"{'FAILED' if failure else 'ok':<6} {taken:6.1f} s  {'' if failure else detail}".rstrip())
        rows.append(Row(name, "FAILED" if failure else "ok", f"{taken:.1f}", "" if failure else detail))
    return rows, failure


def main() -> int:
    """Run the demonstration and return its exit status."""
    signal.signal(signal.SIGTERM, end_by_signal)
    signal.signal(signal.SIGHUP, end_by_signal)
    kernel = os.uname()
    driver = os.environ.get("UBLK_DRIVER", "unknown")
    print(f"Linux {kernel.release}, {driver} ublk driver, Python {sys.version.split()[0]}, {os.cpu_count()} CPUs\n")
    demo = Demo()
    rows: list[Row] = []
    failure = "interrupted"
    began = time.monotonic()
    try:
        rows, failure = perform(demo)
    finally:
        problems = demo.clean()
    print(f"\n{table(rows)}\n\n{'FAILED' if failure or problems else 'All done'} in {time.monotonic() - began:.0f} s")
    for problem in filter(None, [failure, *problems]):
        print(f"demo: {problem}", file=sys.stderr)
    return 1 if failure or problems else 0


if __name__ == "__main__":
    sys.exit(main())
