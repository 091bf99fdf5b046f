# SPDX-License-Identifier: MIT OR Apache-2.0
"""Instructions of a server and of the kernel per function.

tests/bench/profile.py guest PEER JOB QUEUES      in the guest: make the marks and write /results/profile.json
tests/bench/profile.py show DIR [LINES]           on the host: DIR as tests/bench/run --profile leaves it
"""

import bisect
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path


def guest(peer, job, queues):
    """Serve a peer, and profile one window of a job."""
    import counting
    import guest as bench

    os.environ["PATH"] += f":{bench.HERE.parent.parent / 'extra'}"
    bench.prepare()
    how = (bench.JOBS | bench.SLEEPING)[job]
    with bench.served(peer, int(queues)) as path:
        requests = counting.requests_of_window(how)
        argv = [
            "ublk",
            "bench",
            "--marks",
            "--job",
            job,
            "--requests",
            str(requests),
            "--windows",
            "1",
            "--write",
        ]
        client = subprocess.Popen([*argv, path], stdout=subprocess.DEVNULL)
        # It has begun with its requests, or will have mapped its program at least.
        time.sleep(0.2)
        maps = {}
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and process.name != str(os.getpid()):
                lines = (process / "maps").read_text().splitlines()
                maps[(process / "comm").read_text().strip() + " " + process.name] = [x for x in lines if " r-xp " in x]
        if client.wait():
            sys.exit(f"the client ended with status {client.returncode}")
    lines = [line.split() for line in Path("/proc/kallsyms").read_text().splitlines()]
    kernel = sorted((address, name) for address, kind, name, *_ in lines if kind in "tTwW")
    Path("/results/profile.json").write_text(json.dumps({"requests": requests, "maps": maps, "kernel": kernel}))


def symbols(program):
    """Where functions begin in a program, in order, and what they are called."""
    listed = subprocess.run(["nm", "-C", "--defined-only", "-n", program], capture_output=True, text=True, check=True)
    found = [line.split(" ", 2) for line in listed.stdout.splitlines()]
    functions = [
        (int(address, 16), re.sub(r"::h[0-9a-f]{16}$", "", name)) for address, kind, name in found if kind in "tTwW"
    ]
    return [address for address, _ in functions], [name for _, name in functions]


def show(directory, lines=40):
    """Print the functions that take most instructions per request, and how often each is called."""
    known = json.loads((Path(directory) / "count/profile.json").read_text())
    regions = []
    for process, maps in known["maps"].items():
        for line in maps:
            span, _, offset, _, _, *file = line.split(None, 5)
            low, high = (int(bound, 16) for bound in span.split("-"))
            regions.append((low, high, int(offset, 16), process, file[0] if file else "?"))
    requests = known["requests"]
    kernel = [int(address, 16) for address, _ in known["kernel"]], [name for _, name in known["kernel"]]
    tables, programs = {}, Counter()
    functions, calls = {"kernel": Counter(), "user": Counter()}, Counter()

    def add(side, table, place, instructions, runs):
        starts, names = table
        if not starts:
            # Stripped, or not to be seen.
            return
        at = max(bisect.bisect_right(starts, place) - 1, 0)
        functions[side][names[at]] += instructions
        if starts[at] == place:
            calls[names[at]] += runs

    for line in (Path(directory) / "profile").read_text().splitlines():
        address, instructions, runs = line.split()
        address, instructions, runs = int(address, 16), int(instructions), int(runs)
        if address >= 1 << 63:
            programs["kernel"] += instructions
            add("kernel", kernel, address, instructions, runs)
            continue
        region = next((r for r in regions if r[0] <= address < r[1]), None)
        if region is None:
            programs["unknown"] += instructions
            continue
        low, _, offset, process, file = region
        name = Path(file).name
        programs[f"{process.split()[0]}: {name}"] += instructions
        program = Path(directory, "programs", "lib_ublk.so" if name.startswith("_ublk.") else name)
        if program.is_file():
            if file not in tables:
                tables[file] = symbols(program)
            add("user", tables[file], address - low + offset + _bias(program, offset), instructions, runs)
    print(f"{requests} requests; instructions per request:")
    for name, instructions in programs.most_common(12):
        if instructions >= requests:
            print(f"{instructions / requests:9.1f}  {name}")
    for side, counted in functions.items():
        if counted:
            print(f"\n{side}: instructions and calls per request")
        for name, instructions in counted.most_common(int(lines)):
            if instructions >= requests:
                print(f"{instructions / requests:9.1f} {calls[name] / requests:7.2f}  {name}")


def _bias(program, offset):
    """What an address is more than its place in the file, in the part that begins there."""
    listed = subprocess.run(["readelf", "-lW", program], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        words = line.split()
        if words[:1] == ["LOAD"] and int(words[1], 16) & ~0xFFF == offset:
            return int(words[2], 16) - int(words[1], 16)
    return 0


if __name__ == "__main__":
    {"guest": guest, "show": show}[sys.argv[1]](*sys.argv[2:])
