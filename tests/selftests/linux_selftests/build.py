# SPDX-License-Identifier: MIT OR Apache-2.0
"""The selftests, from Debian's package of Linux's source, built and kept in the testbed's cache."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# To be counted up when the way they are built changes.
_RECIPE = 1

# The flags of the selftests' own Makefile.
_FLAGS = ["-D_GNU_SOURCE=", "-O3", "-Wall"]

# Mends the one defect of kublk's that decides results, without a change in its source.
_MENDING = Path(__file__).with_name("kublk_timeout.h")

# Built as a program of its own; all other files make up kublk.
_STANDALONE = "metadata_size.c"

_FOLDER = "tools/testing/selftests/ublk"


class BuildError(Exception):
    """The selftests cannot be had; the text says why."""


@dataclass(frozen=True)
class Selftests:
    """A directory with the scripts and the programs they call."""

    directory: Path
    # The package they come from, with its version.
    source: str

    def scripts(self) -> list[str]:
        """The names of all scripts: NAME of test_NAME.sh."""
        names = (path.stem.removeprefix("test_") for path in self.directory.glob("test_*.sh"))
        return sorted(name for name in names if name != "common")


def _run(*argv: str | Path, cwd: Path | None = None) -> str:
    # Standard error is the user's: vm/package says there what it fetches.
    try:
        done = subprocess.run(argv, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        raise BuildError(f"cannot run {argv[0]}: {error.strerror}") from error
    if done.returncode != 0:
        raise BuildError(f"{argv[0]} {argv[1]} ... failed ({done.returncode})\n{done.stdout}".rstrip())
    return done.stdout


def _cache() -> Path:
    """The testbed's cache, as vm/README.md has it."""
    if place := os.environ.get("UBLK_VM_CACHE"):
        return Path(place)
    if place := os.environ.get("XDG_CACHE_HOME"):
        return Path(place, "ublk-vm")
    return Path.home() / ".cache/ublk-vm"


def obtain(repository: Path, series: str) -> Selftests:
    """The selftests of the newest Linux of the series, built."""

    def package(name: str) -> Path:
        return Path(_run(repository / "vm/package", name).strip())

    source = package(f"linux-source-{series}")
    liburing = package("liburing-dev")
    headers = package("linux-libc-dev")
    compiler = _run("cc", "--version").splitlines()[0]
    parts = [str(_RECIPE), source.name, liburing.name, headers.name, compiler, *_FLAGS, _MENDING.read_text()]
    cache = _cache()
    place = cache / "selftests" / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    (cache / "locks").mkdir(parents=True, exist_ok=True)
    with open(cache / "locks/selftests", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.is_dir():
            place.parent.mkdir(exist_ok=True)
            # The testbed sweeps what a process that is gone has left under such a name.
            temporary = cache / "tmp" / f"{os.getpid()}-selftests-{time.time_ns():x}"
            try:
                _make(source, liburing, headers, temporary).rename(place)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return Selftests(place, source.name)


def _make(source: Path, liburing: Path, headers: Path, temporary: Path) -> Path:
    print(f"building the selftests of {source.name}", file=sys.stderr, flush=True)
    archives = list((source / "usr/src").glob("linux-source-*.tar.xz"))
    if len(archives) != 1:
        raise BuildError(f"{source} holds {len(archives)} archives of Linux's source, not one")
    name = archives[0].name.removesuffix(".tar.xz")
    temporary.mkdir(parents=True)
    _run("tar", "-xJf", archives[0], "-C", temporary, "--no-same-owner", f"{name}/{_FOLDER}")
    tree = temporary / name / _FOLDER
    if not (tree / "kublk.c").is_file():
        raise BuildError(f"{source.name} has no selftests of ublk: Linux got them in 6.15")
    # The kernel's headers go before the host's, which are older.
    includes = [headers / "usr/include", headers / "usr/include/x86_64-linux-gnu", liburing / "usr/include"]
    common = ["cc", *_FLAGS, *(word for path in includes for word in ("-isystem", str(path)))]
    # liburing goes in statically, so that it need not be in the guest in the same version.
    library = liburing / "usr/lib/x86_64-linux-gnu/liburing.a"
    files = sorted(path.name for path in tree.glob("*.c") if path.name != _STANDALONE)
    _run(*common, "-include", _MENDING, "-o", "kublk", *files, library, "-lpthread", "-lm", cwd=tree)
    _run(*common, "-o", Path(_STANDALONE).stem, _STANDALONE, cwd=tree)
    return tree
