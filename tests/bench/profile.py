# SPDX-License-Identifier: MIT OR Apache-2.0
"""Where a server's own instructions go, function by function.

tests/bench/profile.py guest PEER JOB QUEUES      in the guest: makes the marks, writes /results/profile.json
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
    """Serve a peer, and have its disk busy between two marks."""
    import guest as bench

    os.environ["PATH"] += f":{bench.HERE.parent.parent / 'extra'}"
    with bench.FILE.open("wb") as file:
        file.truncate(bench.SIZE)
    begin, end = bench.Marks(1), bench.Marks(2)
    how = bench.JOBS[job]
    with bench.served(peer, int(queues)) as path:
        argv = ["fio", "--name=job", f"--filename={path}", "--ioengine=io_uring", "--direct=1", "--allow_file_create=0"]
        argv += ["--time_based=1", "--runtime=60", "--gtod_reduce=1", "--thread=1", f"--numjobs={queues}"]
        fio = subprocess.Popen(
            [*argv, *(f"--{name}={value}" for name, value in how.items())], stdout=subprocess.DEVNULL
        )
        time.sleep(6)
        size = int(how["bs"][:-1]) << 10
        requests = bench.requests_of(fio, size)
        begin.make()
        time.sleep(3)
        end.make()
        requests = bench.requests_of(fio, size) - requests
        maps = {}
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and process.name != str(os.getpid()):
                lines = (process / "maps").read_text().splitlines()
                maps[(process / "comm").read_text().strip() + " " + process.name] = [x for x in lines if " r-xp " in x]
        fio.kill()
        fio.wait()
    Path("/results/profile.json").write_text(json.dumps({"requests": requests, "maps": maps}))


def symbols(program):
    """Where functions begin in a program, in order, and what they are called."""
    listed = subprocess.run(["nm", "-C", "--defined-only", "-n", program], capture_output=True, text=True, check=True)
    found = [line.split(" ", 2) for line in listed.stdout.splitlines()]
    functions = [
        (int(address, 16), re.sub(r"::h[0-9a-f]{16}$", "", name)) for address, kind, name in found if kind in "tTwW"
    ]
    return [address for address, _ in functions], [name for _, name in functions]


def show(directory, lines=40):
    """Print the functions that take most instructions per request."""
    known = json.loads((Path(directory) / "count/profile.json").read_text())
    regions = []
    for process, maps in known["maps"].items():
        for line in maps:
            span, _, offset, _, _, *file = line.split(None, 5)
            low, high = (int(bound, 16) for bound in span.split("-"))
            regions.append((low, high, int(offset, 16), process, file[0] if file else "?"))
    tables, functions, others = {}, Counter(), Counter()
    for line in (Path(directory) / "profile").read_text().splitlines():
        address, instructions = line.split()
        address, instructions = int(address, 16), int(instructions)
        region = next((r for r in regions if r[0] <= address < r[1]), None)
        if region is None:
            others["unknown"] += instructions
            continue
        low, _, offset, process, file = region
        host = Path("target/release", Path(file).name)
        others[f"{process.split()[0]}: {Path(file).name}"] += instructions
        if not host.is_file():
            continue
        starts, names = tables.setdefault(file, symbols(host) if file not in tables else None)
        place = address - low + offset + _bias(host, offset)
        functions[names[max(bisect.bisect_right(starts, place) - 1, 0)]] += instructions
    requests = known["requests"]
    print(f"{requests} requests; user instructions per request:")
    for name, instructions in others.most_common(12):
        print(f"{instructions / requests:9.1f}  {name}")
    print()
    for name, instructions in functions.most_common(int(lines)):
        print(f"{instructions / requests:9.1f}  {name}")


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
