# SPDX-License-Identifier: MIT OR Apache-2.0
"""Measures all peers in the guest, one after the other and job by job, once per round.

With `--count`, instructions are counted in windows of a fixed number of requests (counting.py). Without it, rates and
latencies are measured in a window of some seconds in the middle of a run of fio.
"""

import argparse
import contextlib
import functools
import json
import mmap
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import many
from counting import Failed, Marks, count

HERE = Path(__file__).resolve().parent
SIZE = 256 << 20
FILE = Path("/mnt/bench.img")

# The jobs, as options of fio.
JOBS = {
    "randread-4k-qd1": {"rw": "randread", "bs": "4k", "iodepth": 1},
    "randread-4k-qd32": {"rw": "randread", "bs": "4k", "iodepth": 32},
    "randread-4k-qd128": {"rw": "randread", "bs": "4k", "iodepth": 128},
    "randwrite-4k-qd1": {"rw": "randwrite", "bs": "4k", "iodepth": 1},
    "randwrite-4k-qd32": {"rw": "randwrite", "bs": "4k", "iodepth": 32},
    "randwrite-4k-qd128": {"rw": "randwrite", "bs": "4k", "iodepth": 128},
    "mixed-4k-qd32": {"rw": "randrw", "rwmixread": 70, "bs": "4k", "iodepth": 32},
    "read-128k-qd32": {"rw": "read", "bs": "128k", "iodepth": 32},
    "write-128k-qd32": {"rw": "write", "bs": "128k", "iodepth": 32},
}
USE_UBLK = ("ublk-", "python-", "kublk-", "rublk-")
QUICK = ["randread-4k-qd1", "randread-4k-qd32", "randwrite-4k-qd32", "read-128k-qd32"]
# For handlers that sleep, only the number that overlap is measured.
SLEEPING = {"randread-4k-qd64": {"rw": "randread", "bs": "4k", "iodepth": 64}}


def prepare():
    """Create the backing file, on ext4 on a RAM disk, and disable transparent huge pages."""
    Path("/sys/kernel/mm/transparent_hugepage/enabled").write_text("never")
    size = (SIZE >> 10) + (64 << 10)
    subprocess.run(["modprobe", "brd", "rd_nr=2", f"rd_size={size}"], check=True)
    subprocess.run(["mkfs.ext4", "-q", "/dev/ram1"], check=True)
    subprocess.run(["mount", "/dev/ram1", FILE.parent], check=True)
    with FILE.open("wb") as file:
        # Allocated now, so that no job measures the allocation of blocks.
        for _ in range(SIZE >> 20):
            file.write(bytes(1 << 20))
        os.fsync(file.fileno())


class Absent(Exception):
    """A peer that is not available; the text is the reason."""


@contextlib.contextmanager
def served(peer, queues):
    """A peer's disk, for as long as the block runs."""
    environment = os.environ | {"QUEUES": str(queues), "DEPTH": "128", "SIZE": str(SIZE), "FILE": str(FILE)}
    with open("/tmp/peer.log", "w+") as log:
        process = subprocess.Popen(
            [HERE / "peers" / peer],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
        )
        try:
            path = process.stdout.readline().rstrip("\n")
            if not path:
                status = process.wait(30)
                log.seek(0)
                said = " ".join(log.read().split())
                raise Absent(said if status == 77 else f"ended with status {status}: {said}")
            subprocess.run(["udevadm", "settle", "--timeout=20"], check=False)
            if "sleeping" not in peer:
                fill(path)
            yield path
        finally:
            process.stdin.close()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def fill(path):
    """Write all of a disk, so that no job measures the allocation of its storage."""
    zeros = mmap.mmap(-1, 1 << 20)
    disk = os.open(path, os.O_WRONLY | os.O_DIRECT)
    try:
        for offset in range(0, SIZE, len(zeros)):
            os.pwrite(disk, zeros, offset)
    finally:
        os.close(disk)


def requests_of(process, size):
    """The number of requests of a size that a process has sent to disks. Not every disk counts its requests."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
    return (int(fields["read_bytes"]) + int(fields["write_bytes"])) // size


def worked(pid):
    """CPU time of a process in seconds: user and system.

    The sum is exact to a tick. The times of CPUs in /proc/stat are not, because their clock stops while a CPU is idle.
    """
    # The 14th field and the next; the second, the name, may have spaces.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    own, kernel = (int(field) / os.sysconf("SC_CLK_TCK") for field in fields)
    return own, kernel


def all_but(*pids):
    """CPU times of all other processes, including kernel threads, which serve disks as well."""
    found = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        # It may have ended.
        with contextlib.suppress(OSError):
            if pid not in pids:
                found[pid] = worked(pid)
    return found


class Work:
    """CPU time from now on in seconds: of the client, of all others, and the user time of the others."""

    def __init__(self, client):
        self._client = client.pid
        self._before = sum(worked(self._client)), all_but(self._client, os.getpid())

    def so_far(self):
        client, others = sum(worked(self._client)), all_but(self._client, os.getpid())
        then, before = self._before
        own, kernel = (sum(now[side] - before.get(pid, (0, 0))[side] for pid, now in others.items()) for side in (0, 1))
        return client - then, own + kernel, own


def measure(clients, options, seconds, marks):
    """Measure one window of one job. Each client has a path, or several separated by colons."""
    ramp = 1.5
    argv = ["fio", "--name=global", "--ioengine=io_uring", "--direct=1", "--allow_file_create=0"]
    argv += [
        "--time_based=1",
        f"--runtime={seconds + 1}",
        f"--ramp_time={ramp}",
        "--group_reporting=1",
        "--thread=1",
        # Otherwise fio searches the statistics of all disks for each one: minutes with some hundreds.
        "--disk_util=0",
    ]
    argv += ["--output-format=json", "--norandommap=1"] + [f"--{name}={value}" for name, value in options.items()]
    # Two clock reads per request are half of fio's work.
    argv += ["--gtod_reduce=1"] if marks is not None else []
    for client in clients:
        argv += ["--name=client", f"--filename={client}"]
    fio = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        size = int(options["bs"][:-1]) << 10
        deadline = time.monotonic() + 60
        while requests_of(fio, size) < 20:
            if fio.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"fio does not get going on {clients[0][:80]} (status {fio.poll()})")
            time.sleep(0.02)
        time.sleep(ramp)
        work = Work(fio)
        began, requests = time.monotonic(), requests_of(fio, size)
        with marks.around() if marks is not None else contextlib.nullcontext():
            time.sleep(seconds)
        requests = requests_of(fio, size) - requests
        lasted, work = time.monotonic() - began, work.so_far()
        if not requests:
            raise Failed(f"no request ended within {lasted:.1f} s on {clients[0][:80]}")
        said = fio.communicate(timeout=120)[0]
    finally:
        if fio.poll() is None:
            fio.kill()
            fio.wait()
    job = json.loads(said[said.index("{") :])["jobs"][0]
    if job["error"]:
        raise Failed(f"fio's error {job['error']} on {clients[0][:80]}")
    sides = [job[side] for side in ("read", "write") if job[side]["total_ios"]]
    if not sides:
        raise Failed(f"fio counted no requests on {clients[0][:80]}")
    main = max(sides, key=lambda side: side["total_ios"])
    percentiles = main["clat_ns"].get("percentile", {})
    latencies = {
        f"p{name[:2]}_us": percentiles[name] / 1000 for name in ("50.000000", "99.000000") if name in percentiles
    }
    client, server, own = (seconds / requests * 1e6 for seconds in work)
    rates = {"iops": requests / lasted, "client_us": client, "server_us": server, "server_user_us": own}
    window = {} if marks is None else {"attempt": marks.attempt}
    return {"requests": requests, "seconds": lasted, **window, **rates, **latencies, "fio": job}


def conditions():
    """The machine and the versions of the programs."""
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    versions = {}
    for name, argv in {
        "fio": ["fio", "--version"],
        "nbdkit": ["nbdkit", "--version"],
        "rublk": ["rublk", "--version"],
    }.items():
        with contextlib.suppress(OSError):
            versions[name] = subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "kernel": platform.release(),
        "driver": os.environ.get("UBLK_DRIVER"),
        "qemu": os.environ.get("UBLK_QEMU"),
        "cpus": os.cpu_count(),
        "cpu": cpu[0],
        "python": platform.python_version(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--queues", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--peers", nargs="*")
    parser.add_argument("--jobs", nargs="*", choices=JOBS)
    parser.add_argument("--ublk-only", action="store_true", help="measure only peers that use ublk")
    parser.add_argument("--many", action="store_true", help="measure many devices at a time and nothing else")
    options = parser.parse_args()
    os.environ["PATH"] += f":{HERE.parent.parent / 'extra'}"
    prepare()
    marks = Marks() if options.count else None
    jobs = {name: JOBS[name] for name in options.jobs or (QUICK if options.quick else JOBS)}
    # For handlers that sleep, only rates are measured.
    known = (path.name for path in (HERE / "peers").iterdir() if not (options.count and "sleeping" in path.name))
    peers = options.peers or sorted(known)
    if options.ublk_only:
        peers = [peer for peer in peers if peer.startswith(USE_UBLK)]
    peers = [] if options.many else peers
    results = Results(Path("/results/bench.json"))
    for turn in range(options.rounds):
        for queues in options.queues:
            for peer in peers:
                if peer not in results.absent:
                    measure_peer(peer, queues, turn, jobs, options.seconds, marks, results)
    if not options.peers and not options.ublk_only:
        counts = many.QUICK if options.quick else many.COUNTS
        work = functools.partial(measure, seconds=options.seconds, marks=marks)
        many.measure(counts, work, marks is None, results)
    return 1 if results.failed else 0


def measure_peer(peer, queues, turn, jobs, seconds, marks, results):
    """Run all jobs on one peer. A failure costs only this peer or this job."""
    name = f"{peer} q{queues} round {turn}"
    try:
        with served(peer, queues) as path:
            for job, how in (SLEEPING if "sleeping" in peer else jobs).items():
                try:
                    if marks is not None:
                        result = count(path, job, how, marks)
                    else:
                        result = measure([path] * queues, how, seconds, None)
                except (Failed, OSError, ValueError, KeyError, subprocess.SubprocessError) as why:
                    results.fail(f"{name} {job}", why)
                    continue
                results.add("results", {"round": turn, "peer": peer, "queues": queues, "job": job, **result})
                done = f"{result['iops']:.0f}/s" if "iops" in result else "counted"
                print(f"{peer} {job} q{queues}: {done}", file=sys.stderr, flush=True)
    except Absent as why:
        results.leave_out(peer, why)
    except (OSError, subprocess.SubprocessError) as why:
        results.fail(name, why)


class Results:
    """Results so far, in a file that is complete after each window."""

    def __init__(self, path):
        self._path = path
        self._document = {"conditions": conditions(), "results": [], "absent": {}, "many": [], "failed": {}}
        self._write()

    @property
    def absent(self):
        return self._document["absent"]

    @property
    def failed(self):
        return self._document["failed"]

    def add(self, kind, row):
        self._document[kind].append(row)
        self._write()

    def leave_out(self, name, why):
        print(f"{name} is absent: {why}", file=sys.stderr, flush=True)
        self.absent[name] = str(why)
        self._write()

    def fail(self, name, why):
        print(f"{name} FAILED: {why}", file=sys.stderr, flush=True)
        self.failed[name] = str(why) or type(why).__name__
        self._write()

    def _write(self):
        # The machine may die at any time.
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps(self._document, indent=1))
        temporary.rename(self._path)


if __name__ == "__main__":
    sys.exit(main())
